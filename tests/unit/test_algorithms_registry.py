"""Algorithms by name: what each name switches on, what it refuses."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from megatron_mmrl.algorithms.advantages import group_advantages
from megatron_mmrl.algorithms.filters import keep_informative
from megatron_mmrl.algorithms.registry import ALGORITHMS, build_algorithm
from megatron_mmrl.config.algorithm import AlgorithmConfig
from megatron_mmrl.types import EncodedPrompt, Group, Prompt, Score

REWARDS = np.array([1.0, 0.0, 0.0, 0.0])


def scored_group(rewards: list[float]) -> Group:
    prompt = Prompt(id="p", source="s", messages=(), images=(), answer="7")
    ids = np.array([1], dtype=np.int64)
    encoded = EncodedPrompt(
        prompt=prompt,
        ids=ids,
        engine_ids=ids,
        images=(),
        pixel_values=np.zeros((0, 1176), np.float32),
        image_grid_thw=np.zeros((0, 3), np.int64),
    )
    return Group(prompt=encoded, responses=(), scores=tuple(Score(total=r, terms={}) for r in rewards))


def test_filter_drops_what_has_no_advantage() -> None:
    for rewards in ([0.9] * 8, [1.0], [0.3, 0.1 + 0.2], [0.0, 1.0], [0.9, 1.0, 0.9]):
        kept = keep_informative(scored_group(rewards), std_floor=1e-6)
        assert kept == bool(group_advantages(np.array(rewards)).any())


def test_grpo_is_what_the_keys_say() -> None:
    assert build_algorithm(AlgorithmConfig()).advantage(REWARDS).tolist() == [1.5, -0.5, -0.5, -0.5]
    without = build_algorithm(AlgorithmConfig(normalize_std=False))
    assert without.advantage(REWARDS).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert build_algorithm(AlgorithmConfig()).select(scored_group([1.0, 1.0]))
    assert not build_algorithm(AlgorithmConfig(drop_uniform_groups=True)).select(scored_group([1.0, 1.0]))


def test_dr_grpo_leaves_the_std_out() -> None:
    assert build_algorithm(AlgorithmConfig(name="dr_grpo")).advantage(REWARDS).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_dapo_drops_groups_without_a_signal() -> None:
    dapo = build_algorithm(AlgorithmConfig(name="dapo"))
    assert not dapo.select(scored_group([0.9] * 8))
    assert dapo.select(scored_group([0.9, 1.0]))


def test_the_floor_reaches_advantage_and_filter() -> None:
    dapo = build_algorithm(AlgorithmConfig(name="dapo", std_floor=0.6))
    assert dapo.advantage(REWARDS).tolist() == [0.0] * 4
    assert not dapo.select(scored_group(REWARDS.tolist()))


@pytest.mark.parametrize("name", ["dapo", "dr_grpo"])
def test_a_setting_that_contradicts_the_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*seq_mean"):
        build_algorithm(AlgorithmConfig(name=name, aggregation="seq_mean"))


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean dr_grpo"):
        build_algorithm(AlgorithmConfig(name="drgrpo"))
    with pytest.raises(ValueError, match="known: grpo, dapo, dr_grpo"):
        build_algorithm(AlgorithmConfig(name="zzzz"))


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_algorithms_carry_their_name_and_can_be_pickled(name: str) -> None:
    algorithm = pickle.loads(pickle.dumps(build_algorithm(AlgorithmConfig(name=name))))
    assert algorithm.name == name
    np.testing.assert_array_equal(
        algorithm.advantage(REWARDS), build_algorithm(AlgorithmConfig(name=name)).advantage(REWARDS)
    )


def test_building_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_mmrl.algorithms.registry import build_algorithm; "
        "from megatron_mmrl.config.algorithm import AlgorithmConfig; build_algorithm(AlgorithmConfig()); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
