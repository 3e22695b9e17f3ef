"""Algorithms by name: what each name switches on, what it refuses."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from megatron_mmrl.algorithms.advantages import group_advantages
from megatron_mmrl.algorithms.filters import keep_by_accuracy, keep_group, keep_informative
from megatron_mmrl.algorithms.registry import ALGORITHMS, Algorithm, build_algorithm
from megatron_mmrl.config.algorithm import (
    AccuracyFilterConfig,
    AdoraConfig,
    AlgorithmConfig,
    DynamicSamplingConfig,
    MismatchMaskConfig,
)
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


def built(**settings) -> Algorithm:
    return build_algorithm(AlgorithmConfig(**settings), max_response_tokens=10)


def baseline(algorithm: Algorithm) -> list[float]:
    return algorithm.advantages.baseline(REWARDS).tolist()


def test_grpo_is_what_the_keys_say() -> None:
    assert baseline(built()) == [1.5, -0.5, -0.5, -0.5]
    assert baseline(built(normalize_std=False)) == [0.75, -0.25, -0.25, -0.25]
    assert built().select(scored_group([1.0, 1.0]), 1)
    assert not built(drop_uniform_groups=True).select(scored_group([1.0, 1.0]), 1)


def test_what_each_name_makes_of_rewards() -> None:
    assert baseline(built(name="dr_grpo")) == [0.75, -0.25, -0.25, -0.25]
    assert baseline(built(name="rloo")) == [1.0, *[pytest.approx(-1 / 3)] * 3]
    assert baseline(built(name="reinforce_pp")) == [1.0, 0.0, 0.0, 0.0]
    assert baseline(built(name="reinforce_pp_baseline")) == [0.75, -0.25, -0.25, -0.25]
    for name in ("dapo", "gspo", "cispo"):
        assert baseline(built(name=name)) == [1.5, -0.5, -0.5, -0.5]


def test_how_each_name_sums_tokens() -> None:
    """One response with two tokens of loss -A = -1, of two sequences, five tokens: -2/5, -1/2 or -2/(2 x 10)."""
    import torch

    from megatron_mmrl.algorithms.losses import LossInputs

    ones = torch.ones(2)
    inputs = LossInputs(
        logprobs=-ones,
        advantages=ones,
        loss_mask=ones.bool(),
        sequence=torch.zeros(2, dtype=torch.long),
        tokens_in_sequence=2 * ones,
    )
    expected = {"dr_grpo": -0.1, "gspo": -0.5, "cispo": 0.4}  # CISPO's token: -A log pi = 1
    for name in ALGORITHMS:
        assert built(name=name).loss(inputs, 5, 2).loss.item() == pytest.approx(expected.get(name, -0.4))
    assert built(name="dr_grpo", aggregation_length=4).loss(inputs, 5, 2).loss.item() == pytest.approx(-0.25)
    assert built(name="dr_grpo", aggregation="token_mean").loss(inputs, 5, 2).loss.item() == pytest.approx(-0.4)
    with pytest.raises(ValueError, match="aggregation_length"):
        build_algorithm(AlgorithmConfig(name="dr_grpo")).loss(inputs, 5, 2)


def accuracies(*values: float) -> Group:
    scores = tuple(Score(total=9.0, terms={"accuracy": value, "format": 1.0}) for value in values)
    return replace(scored_group([]), scores=scores)


def test_the_accuracy_filter_by_hand() -> None:
    limits = AccuracyFilterConfig(enabled=True, lower=0.25, upper=0.75, freezing_steps=2)
    for values, kept in (((0, 0, 0, 0), False), ((1, 0, 0, 0), True), ((1, 1, 1, 0), True), ((1, 1, 1, 1), False)):
        assert keep_by_accuracy(accuracies(*values), 3, limits=limits) == kept
        assert keep_by_accuracy(accuracies(*values[::-1]), 3, limits=limits) == kept
        assert keep_by_accuracy(accuracies(*values), 2, limits=limits)  # frozen up to step 2
        always = replace(limits, freezing_steps=-1)
        assert keep_by_accuracy(accuracies(*values), 1, limits=always) == kept
    with pytest.raises(ValueError, match=r"'truth' is not among the reward's terms \['accuracy', 'format'\]"):
        keep_by_accuracy(accuracies(1, 0), 1, limits=replace(limits, term="truth"))


def test_filters_add_up() -> None:
    config = AlgorithmConfig(drop_uniform_groups=True, accuracy_filter=AccuracyFilterConfig(enabled=True))
    assert not keep_group(accuracies(1, 0), 1, config=config)  # totals are equal
    assert keep_group(accuracies(1, 0), 1, config=replace(config, drop_uniform_groups=False))
    assert not keep_group(accuracies(1, 1), 1, config=replace(config, drop_uniform_groups=False))
    assert keep_group(accuracies(1, 1), 1, config=AlgorithmConfig())


def test_dynamic_sampling_needs_a_filter() -> None:
    sampling = DynamicSamplingConfig(enabled=True)
    with pytest.raises(ValueError, match="no filter drops any group"):
        built(dynamic_sampling=sampling)
    built(dynamic_sampling=sampling, name="dapo")
    built(dynamic_sampling=sampling, drop_uniform_groups=True)
    built(dynamic_sampling=sampling, accuracy_filter=AccuracyFilterConfig(enabled=True))


def test_dapo_drops_groups_without_a_signal() -> None:
    dapo = build_algorithm(AlgorithmConfig(name="dapo"))
    assert not dapo.select(scored_group([0.9] * 8), 1)
    assert dapo.select(scored_group([0.9, 1.0]), 1)


def test_the_floor_reaches_advantage_and_filter() -> None:
    dapo = build_algorithm(AlgorithmConfig(name="dapo", std_floor=0.6))
    assert baseline(dapo) == [0.0] * 4
    assert not dapo.select(scored_group(REWARDS.tolist()), 1)


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [("dapo", "seq_mean"), ("dr_grpo", "seq_mean"), ("gspo", "token_mean"), ("cispo", "fixed_length")],
)
def test_a_setting_that_contradicts_the_name_is_refused(name: str, aggregation: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{aggregation}"):
        built(name=name, aggregation=aggregation)


def test_cispo_has_no_dual_clip() -> None:
    with pytest.raises(ValueError, match=r"cispo.*dual_clip=3\.0"):
        built(name="cispo", dual_clip=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.1}, "clip_low=1.1"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
        ({"reference_refresh_every": 5}, "reference_refresh_every=5 without a reference model"),
        ({"kl_in": "reward", "kl_estimator": "k3_unbiased"}, "k3_unbiased"),
        ({"aggregation_length": 0}, "aggregation_length=0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AccuracyFilterConfig(lower=0.9, upper=0.1), "lower=0.9, upper=0.1"),
        (lambda: DynamicSamplingConfig(max_rounds=0), "max_rounds=0"),
        (lambda: DynamicSamplingConfig(oversample=0.5), "oversample=0.5"),
        (lambda: AdoraConfig(lamda=-1.0), "lamda=-1.0"),
        (lambda: MismatchMaskConfig(low=1.0), "low=1.0"),
    ],
)
def test_impossible_sections_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean dr_grpo"):
        build_algorithm(AlgorithmConfig(name="drgrpo"))
    with pytest.raises(ValueError, match="known: grpo, dapo, dr_grpo, rloo"):
        build_algorithm(AlgorithmConfig(name="zzzz"))


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_algorithms_carry_their_name_and_can_be_pickled(name: str) -> None:
    algorithm = pickle.loads(pickle.dumps(build_algorithm(AlgorithmConfig(name=name))))
    assert algorithm.name == name
    assert baseline(algorithm) == baseline(built(name=name))


def test_building_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_mmrl.algorithms.registry import build_algorithm; "
        "from megatron_mmrl.config.algorithm import AlgorithmConfig; build_algorithm(AlgorithmConfig()); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
