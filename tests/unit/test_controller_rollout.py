"""Which groups a step gets: in one round or several, in what order, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from megatron_mmrl.config.algorithm import AccuracyFilterConfig, AlgorithmConfig, DynamicSamplingConfig
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.config.run import RunConfig
from megatron_mmrl.controller.rollout import Rollout, collect
from megatron_mmrl.types import Group
from tests.unit.test_controller import group

MIXED, UNIFORM = (1.0, 0.0), (1.0, 1.0)


class Data:
    """Numbers every third prompt as one with an answer to learn from; asked from ``position`` on."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def next(self, n: int) -> list[int]:
        self.position += n
        return list(range(self.position - n, self.position))


class Engines:
    """Answers prompt k: mixed rewards where k is a multiple of 3; notes what it was asked."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, prompts: Sequence[int], sampling: object, *, seed: int, step: int, finished) -> list[Group]:
        self.seeds.append(seed)
        groups = [group(str(k), UNIFORM if k % 3 else MIXED, (2, 3)) for k in prompts]
        for each in reversed(groups):
            finished(each)
        return groups


class Scores:
    """Scores are on the groups already; they may be asked for only if they were submitted before."""

    def __init__(self) -> None:
        self.submitted: list[str] = []

    def submit(self, group: Group) -> None:
        self.submitted.append(group.prompt.prompt.id)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        assert {each.prompt.prompt.id for each in groups} <= set(self.submitted)
        return list(groups)


def parts_of(algorithm: AlgorithmConfig, *, prompts: int = 4, position: int = 0) -> SimpleNamespace:
    config = Config(
        model=ModelConfig(path="m"),
        run=RunConfig(seed=5),
        rollout=RolloutConfig(prompts_per_step=prompts, samples_per_prompt=2),
        algorithm=algorithm,
    )
    entered = []

    @contextmanager
    def generating():
        entered.append(True)
        yield

    return SimpleNamespace(
        config=config,
        algorithm=build_algorithm(algorithm),
        prompts=Data(position),
        fleet=Engines(),
        scorer=Scores(),
        sampling=None,
        handover=SimpleNamespace(generating=generating),
        log=SimpleNamespace(time=lambda _: nullcontext()),
        entered=entered,
    )


def names(groups: Sequence[Group]) -> list[int]:
    return [int(each.prompt.prompt.id) for each in groups]


def dynamic(**settings: float) -> AlgorithmConfig:
    return AlgorithmConfig(drop_uniform_groups=True, dynamic_sampling=DynamicSamplingConfig(enabled=True, **settings))


def test_one_round_without_dynamic_sampling() -> None:
    parts = parts_of(AlgorithmConfig(drop_uniform_groups=True))
    rollout = collect(parts, 1)
    assert names(rollout.groups) == [0, 3]
    assert names(rollout.generated) == [0, 1, 2, 3]
    assert rollout.counters() == {
        "sampling/rounds": 1, "sampling/generated": 4, "sampling/refused": 2, "sampling/surplus": 0, "sampling/used": 2,
    }  # fmt: skip
    assert parts.fleet.seeds == [5]
    assert names(collect(parts_of(AlgorithmConfig()), 1).groups) == [0, 1, 2, 3]  # without any filter


def test_rounds_follow_until_the_step_is_full() -> None:
    # 0 3 of 0..3; two missing: 4 5 -> none; 6 7 -> 6; one missing: 8 -> none; 9 -> 9
    parts = parts_of(dynamic(max_rounds=9))
    rollout = collect(parts, 1)
    assert names(rollout.groups) == [0, 3, 6, 9]
    assert (rollout.rounds, len(rollout.generated), parts.prompts.position) == (5, 10, 10)
    assert len(set(parts.fleet.seeds)) == 5  # no round draws as another does
    assert parts.fleet.seeds[0] == 5  # the first as without dynamic sampling
    assert parts.entered == [True]  # the engines are handed the device once


def test_oversampling_saves_rounds_and_drops_the_surplus_in_the_order_of_the_data() -> None:
    # 4 x 3 = 12 prompts: 0 3 6 9; with 3.5 x 4 = 14: 0 3 6 9 12, the last is not needed
    rollout = collect(parts_of(dynamic(oversample=3.0)), 1)
    assert (names(rollout.groups), rollout.rounds) == ([0, 3, 6, 9], 1)
    rollout = collect(parts_of(dynamic(oversample=3.5)), 1)
    assert names(rollout.groups) == [0, 3, 6, 9]
    counters = rollout.counters()
    assert (counters["sampling/surplus"], counters["sampling/refused"], counters["sampling/generated"]) == (1, 9, 14)


def test_after_the_last_round_the_step_takes_what_there_is() -> None:
    rollout = collect(parts_of(dynamic(max_rounds=2)), 1)
    assert (names(rollout.groups), rollout.rounds) == ([0, 3], 2)


def test_a_run_that_resumes_collects_what_the_unbroken_one_did() -> None:
    algorithm = dynamic(max_rounds=3, oversample=1.5)
    parts = parts_of(algorithm)
    unbroken: list[Rollout] = [collect(parts, step) for step in (1, 2, 3)]
    position = len(unbroken[0].generated)
    resumed = parts_of(algorithm, position=position)
    again = [collect(resumed, step) for step in (2, 3)]
    assert [names(each.groups) for each in again] == [names(each.groups) for each in unbroken[1:]]
    assert [names(each.generated) for each in again] == [names(each.generated) for each in unbroken[1:]]
    assert resumed.fleet.seeds == parts.fleet.seeds[unbroken[0].rounds :]


@pytest.mark.parametrize(("step", "expected"), [(2, [0, 1, 2, 3]), (3, [0, 3])])
def test_the_accuracy_filter_begins_after_its_freezing_steps(step: int, expected: list[int]) -> None:
    algorithm = AlgorithmConfig(accuracy_filter=AccuracyFilterConfig(enabled=True, freezing_steps=2))
    assert names(collect(parts_of(algorithm), step).groups) == expected
