"""The loop with recorded parts: how many updates, in what order with what else, and what a step without groups does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config
from megatron_mmrl.config.algorithm import AlgorithmConfig
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.config.run import RunConfig
from megatron_mmrl.config.trainer import TrainerConfig
from megatron_mmrl.controller.loop import train
from megatron_mmrl.controller.parts import Parts
from megatron_mmrl.types import Group, TrainSequence, UpdateStats
from tests.unit.test_controller import group


class Recorder:
    """Everything that a loop talks to; notes the calls that matter, with what was learned from."""

    rank, world_size = 0, 1

    def __init__(self, rewards: Sequence[float]) -> None:
        self.calls: list[str] = []
        self.last = -1
        self.rows: list[dict] = []
        self.last = -1
        self.advantages: list[list[float]] = []
        self.batch_sizes: list[int] = []
        self._rewards = rewards

    def next(self, n: int) -> list[int]:
        return list(range(n))

    def generate(self, prompts: Sequence[int], *_: object, finished: Callable[[Group], None], **__: object) -> list:
        return [group(str(k), self._rewards, (2, 3)) for k in prompts]

    def score(self, groups: Sequence[Group]) -> Sequence[Group]:
        return groups

    def submit(self, group: Group) -> None: ...

    def counters(self) -> dict[str, float]:
        return {}

    def publish(self, version: int) -> None:
        self.calls.append(f"publish {version}")

    @contextmanager
    def generating(self):
        self.calls.append("generate")
        yield

    def update(self, batch: Sequence[TrainSequence], loss: object) -> UpdateStats:
        self.calls.append("update")
        self.batch_sizes.append(len(batch))
        self.advantages.append([float(each.advantages[-1]) for each in batch])
        return UpdateStats(loss=1.0, grad_norm=1.0, lr=0.1, metrics={})

    def refresh_reference(self) -> None:
        self.calls.append("refresh")

    def logprobs(self, batch: Sequence[TrainSequence]) -> list:
        self.calls.append("log pi_old")
        return [np.zeros(len(each.ids), np.float32) for each in batch]

    def reference_logprobs(self, batch: Sequence[TrainSequence]) -> list:
        self.calls.append("log pi_ref")
        return [np.zeros(len(each.ids), np.float32) for each in batch]

    def pack(self, sequences: Sequence[TrainSequence]) -> SimpleNamespace:
        return SimpleNamespace(batch=sequences, unpack=lambda values: dict(enumerate(values)))

    speaks_for_replica = True

    def all_gather(self, value: object) -> list:
        return [value]

    def time(self, phase: str) -> nullcontext:
        return nullcontext()

    def write(self, step: int, row: dict) -> None:
        self.rows.append(row)

    def completions(self, step: int, groups: Sequence[Group]) -> None: ...


def run(
    algorithm: AlgorithmConfig,
    *,
    steps: int,
    rewards: Sequence[float] = (1.0, 0.0),
    mini_batch: int | None = 4,
    stop_after: float = math.inf,
) -> Recorder:
    recorder = Recorder(rewards)
    config = Config(
        model=ModelConfig(path="m"),
        run=RunConfig(evaluate_before_training=False),
        rollout=RolloutConfig(prompts_per_step=3, samples_per_prompt=2),
        trainer=TrainerConfig(mini_batch_sequences=mini_batch),
        algorithm=algorithm,
    )
    parts = Parts(
        config=config, policy=recorder, fleet=recorder, scorer=recorder, algorithm=build_algorithm(algorithm),
        packer=recorder, prompts=recorder, eval_prompts=(), sampling=None, handover=recorder, log=recorder,
        exchange=recorder, num_steps=steps, start_step=0, save=lambda step: recorder.calls.append(f"save {step}"),
        stop_asked=lambda: len(recorder.rows) >= stop_after,
    )  # fmt: skip
    recorder.last = train(parts)
    return recorder


def test_every_iteration_passes_over_every_mini_batch() -> None:
    recorder = run(AlgorithmConfig(num_iterations=3, normalize_std=False), steps=1)
    assert recorder.calls == ["publish 0", "generate", "log pi_old", *["update"] * 6, "publish 1", "save 1"]
    assert recorder.batch_sizes == [3, 3] * 3  # six sequences in parts of at most four
    assert recorder.advantages == [[0.5, -0.5, 0.5], [-0.5, 0.5, -0.5]] * 3
    assert recorder.rows[0]["updates"] == 6
    assert recorder.rows[0]["sampling/used"] == 3


def test_the_reference_is_refreshed_after_its_steps_and_before_they_are_saved() -> None:
    recorder = run(AlgorithmConfig(kl_coef=0.1, reference_refresh_every=2), steps=4)
    moments = [call for call in recorder.calls if call.split()[0] in ("publish", "refresh", "save")]
    assert moments == ["publish 0", "publish 1", "publish 2", "refresh", "publish 3", "publish 4", "refresh", "save 4"]
    assert recorder.calls.count("log pi_ref") == 4


def test_a_kl_in_the_reward_needs_both_log_probs_though_one_update_follows() -> None:
    algorithm = AlgorithmConfig(kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    for config, passes in ((algorithm, 1), (replace(algorithm, kl_coef=0.0), 0)):
        recorder = run(config, steps=1, mini_batch=None)
        assert recorder.calls.count("log pi_old") == recorder.calls.count("log pi_ref") == passes


def test_a_step_that_keeps_no_group_makes_no_update() -> None:
    recorder = run(AlgorithmConfig(drop_uniform_groups=True), steps=1, rewards=(1.0, 1.0))
    assert "update" not in recorder.calls
    assert recorder.rows[0]["updates"] == 0
    assert recorder.rows[0]["sampling/refused"] == 3


def test_a_run_that_is_asked_to_stop_ends_its_step_and_starts_no_other() -> None:
    recorder = run(AlgorithmConfig(), steps=4, stop_after=2)
    assert recorder.last == len(recorder.rows) == 2
    assert recorder.calls[-1] == "publish 2"  # the engines have the weights of the step that is kept
    assert run(AlgorithmConfig(), steps=4, stop_after=0).calls == ["publish 0"]
    assert run(AlgorithmConfig(), steps=2).last == 2
