"""The clipped loss and its parts, against values worked out by hand and against what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.aggregate import count_tokens_in_sequence
from megatron_mmrl.algorithms.corrections import truncated_importance_weights
from megatron_mmrl.algorithms.kl import KL_ESTIMATORS, k1, k2, k3
from megatron_mmrl.algorithms.losses import LossInputs, policy_loss
from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.algorithms.surrogates import clipped_surrogate
from megatron_mmrl.config.algorithm import AlgorithmConfig
from tests.unit.loss_case import LENGTHS, cut, random_inputs


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def four_tokens() -> LossInputs:
    """One token in each corner: ratio above or below the clip, advantage positive or negative."""
    return LossInputs(
        logprobs=logs(0.5, 0.3, 0.5, 0.3).requires_grad_(),
        old_logprobs=logs(0.4, 0.4, 0.4, 0.4),
        advantages=torch.tensor([2.0, -1.0, -1.0, 1.0], dtype=torch.float64),
        loss_mask=torch.ones(4, dtype=torch.bool),
    )


EVERYTHING = AlgorithmConfig(kl_coef=0.1, tis_cap=1.5)


def test_loss_by_hand() -> None:
    # ratios 5/4, 3/4, 5/4, 3/4, clipped to 1.2 and 0.8:
    # -min(1.25 x 2, 1.2 x 2) = -2.4; -min(-0.75, -0.8) = 0.8; -min(-1.25, -1.2) = 1.25; -min(0.75, 0.8) = -0.75
    inputs = four_tokens()
    out = policy_loss(inputs, 4, 1, config=AlgorithmConfig())
    assert out.loss.item() == pytest.approx((-2.4 + 0.8 + 1.25 - 0.75) / 4, rel=1e-12)
    assert out.metrics["clip_fraction"].item() == 2
    assert out.metrics["ratio"].item() == pytest.approx(4.0)
    assert out.metrics["kl"].item() == 0
    # d(-rho A)/d(log pi) = -rho A where the clip is not active, 0 where it is; over 4 tokens
    out.loss.backward()
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([0, 0, 1.25, -0.75], dtype=torch.float64) / 4)


def test_surrogate_per_token_and_higher_upper_clip() -> None:
    inputs = four_tokens()
    log_ratio = inputs.logprobs - inputs.old_logprobs
    loss, clipped = clipped_surrogate(log_ratio, inputs.advantages, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([-2.5, 0.8, 1.25, -0.75], dtype=torch.float64))  # 1.25 < 1.28
    assert clipped.tolist() == [False, True, False, False]


def test_gradient_raises_the_probability_of_good_tokens() -> None:
    logprobs = logs(0.2, 0.2).requires_grad_()
    inputs = LossInputs(
        logprobs=logprobs, advantages=torch.tensor([1.0, -2.0]), loss_mask=torch.ones(2, dtype=torch.bool)
    )
    policy_loss(inputs, 2, 1, config=AlgorithmConfig()).loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("config", [AlgorithmConfig(), EVERYTHING, AlgorithmConfig(aggregation="seq_mean")])
def test_without_old_logprobs_loss_and_gradient_are_those_of_equal_ones(config: AlgorithmConfig) -> None:
    skipped, given = random_inputs(), random_inputs()
    skipped = replace(skipped, old_logprobs=None)
    given = replace(given, old_logprobs=given.logprobs.detach().clone())
    for inputs in (skipped, given):
        policy_loss(inputs, 10, 4, config=config).loss.backward()
    assert torch.equal(skipped.logprobs.grad, given.logprobs.grad)
    assert policy_loss(skipped, 10, 4, config=config).metrics == policy_loss(given, 10, 4, config=config).metrics


def test_dapo_at_equal_clips_is_grpo() -> None:
    numbers = {"clip_low": 0.2, "clip_high": 0.2}
    grpo, dapo = (build_algorithm(AlgorithmConfig(name=name, **numbers)) for name in ("grpo", "dapo"))
    first, second = grpo.loss(random_inputs(), 11, 4), dapo.loss(random_inputs(), 11, 4)
    assert torch.equal(first.loss, second.loss)
    assert first.metrics == second.metrics
    higher = build_algorithm(AlgorithmConfig(name="dapo", clip_low=0.2, clip_high=0.6))
    assert not torch.equal(higher.loss(random_inputs(), 11, 4).loss, first.loss)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean"])
@pytest.mark.parametrize("pieces", [((0, 1), (1, 4)), ((0, 2), (2, 3), (3, 4)), ((0, 1), (1, 2), (2, 3), (3, 4))])
def test_splitting_changes_neither_loss_nor_gradient(aggregation: str, pieces: tuple) -> None:
    config = replace(EVERYTHING, aggregation=aggregation)
    whole, split = random_inputs(), random_inputs()
    count = int(whole.loss_mask.sum())
    expected = policy_loss(whole, count, 4, config=config)
    expected.loss.backward()
    bounds = np.cumsum((0, *LENGTHS))
    outputs = [policy_loss(cut(split, slice(bounds[a], bounds[b])), count, 4, config=config) for a, b in pieces]
    sum(out.loss for out in outputs).backward()
    torch.testing.assert_close(sum(out.loss for out in outputs), expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(split.logprobs.grad, whole.logprobs.grad, rtol=1e-12, atol=0)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(sum(out.metrics[name] for out in outputs), value, rtol=1e-12, atol=0)
    assert max(out.maxima["mismatch/max_abs"] for out in outputs) == expected.maxima["mismatch/max_abs"]


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean"])
def test_a_sequence_cut_in_two_gives_the_same_sum(aggregation: str) -> None:
    """Context parallelism: tokens of one sequence lie on several ranks, in any order."""
    inputs = random_inputs()
    config = replace(EVERYTHING, aggregation=aggregation)
    order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    parts = [policy_loss(cut(inputs, order[part::3]), 10, 4, config=config).loss for part in range(3)]
    torch.testing.assert_close(sum(parts), policy_loss(inputs, 10, 4, config=config).loss, rtol=1e-12, atol=0)


def test_aggregations_by_hand() -> None:
    # pi = pi_old, so a token's loss is -A. Sequence 1: 1, 3 (mean 2); sequence 2: 8 and one token masked (mean 8).
    mask = torch.tensor([True, True, True, False])
    inputs = LossInputs(
        logprobs=torch.zeros(4),
        advantages=-torch.tensor([1.0, 3.0, 8.0, 100.0]),
        loss_mask=mask,
        tokens_in_sequence=torch.from_numpy(count_tokens_in_sequence(mask.numpy(), np.array([0, 2, 4], np.int32))),
    )
    assert policy_loss(inputs, 3, 2, config=AlgorithmConfig()).loss.item() == 4.0
    assert policy_loss(inputs, 3, 2, config=AlgorithmConfig(aggregation="seq_mean")).loss.item() == 5.0
    # counts are global: as one of two equal ranks, this share is half of it
    assert policy_loss(inputs, 6, 4, config=AlgorithmConfig()).loss.item() == 2.0
    assert policy_loss(inputs, 6, 4, config=AlgorithmConfig(aggregation="seq_mean")).loss.item() == 2.5


def test_counting_tokens_of_a_sequence() -> None:
    mask = np.array([0, 1, 1, 0, 0, 0, 1], dtype=bool)
    counts = count_tokens_in_sequence(mask, np.array([0, 3, 5, 7], np.int32))
    assert counts.tolist() == [2, 2, 2, 0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"from 0 to 6.*from 0 to 7"):
        count_tokens_in_sequence(mask, np.array([0, 3, 6], np.int32))


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_nothing_leaks_from_outside_the_mask(aggregation: str, garbage: float) -> None:
    config = replace(EVERYTHING, aggregation=aggregation)
    clean, dirty = random_inputs(), random_inputs()
    outside = ~clean.loss_mask
    dirty = replace(
        dirty,
        **{
            name: getattr(dirty, name).detach().masked_fill(outside, garbage).requires_grad_(name == "logprobs")
            for name in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages")
        },
    )
    first, second = policy_loss(clean, 10, 4, config=config), policy_loss(dirty, 10, 4, config=config)
    first.loss.backward()
    second.loss.backward()
    assert torch.equal(first.loss, second.loss)
    assert first.metrics == second.metrics
    assert torch.equal(clean.logprobs.grad, dirty.logprobs.grad)
    assert not dirty.logprobs.grad[outside].any()


def test_a_micro_batch_without_loss_tokens_gives_zero_with_gradient() -> None:
    inputs = replace(random_inputs(), loss_mask=torch.zeros(sum(LENGTHS), dtype=torch.bool))
    out = policy_loss(inputs, 5, 2, config=EVERYTHING)
    out.loss.backward()
    assert out.loss.item() == 0
    assert not inputs.logprobs.grad.any()
    assert out.maxima["mismatch/max_abs"].item() == 0


@pytest.mark.parametrize(("aggregation", "counts"), [("token_mean", (0, 1)), ("seq_mean", (1, 0))])
def test_a_mini_batch_without_loss_tokens_is_refused(aggregation: str, counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="=0"):
        policy_loss(random_inputs(), *counts, config=AlgorithmConfig(aggregation=aggregation))


def test_kl_estimators_by_hand() -> None:
    # pi = 1/2, pi_ref = 1/4: d = -log 2
    d = torch.tensor([-math.log(2)], dtype=torch.float64)
    assert k1(d).item() == pytest.approx(math.log(2))
    assert k2(d).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(d).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_estimators_agree_with_the_true_kl() -> None:
    """Over a whole distribution k1 and k3 average to sum p log(p / q), exactly; k2 does not."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    true = (p * (p / q).log()).sum()
    d = (q / p).log()
    torch.testing.assert_close((p * k1(d)).sum(), true)
    torch.testing.assert_close((p * k3(d)).sum(), true)
    assert abs((p * k2(d)).sum() - true) > 1e-4


def test_k3_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-7, 1e-4, 1e-2, 1.0, 10.0):
        assert (k3(torch.randn(10_000, generator=generator) * scale) >= 0).all()
    assert k3(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
def test_kl_term_is_added_with_its_weight(estimator: str) -> None:
    # advantage 0 leaves the KL alone: pi 0.5 and 0.25, reference 0.25 and 0.25 -> d = -log 2 and 0
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2}.get(estimator, math.log(2) - 0.5)
    inputs = LossInputs(
        logprobs=logs(0.5, 0.25),
        ref_logprobs=logs(0.25, 0.25),
        advantages=torch.zeros(2),
        loss_mask=torch.ones(2, dtype=torch.bool),
    )
    out = policy_loss(inputs, 2, 1, config=AlgorithmConfig(kl_coef=0.1, kl_estimator=estimator))
    assert out.loss.item() == pytest.approx(0.1 * expected / 2)
    assert out.metrics["kl"].item() == pytest.approx(expected)


def test_kl_gradient_pulls_towards_the_reference() -> None:
    inputs = LossInputs(
        logprobs=logs(0.5, 0.2).requires_grad_(),
        ref_logprobs=logs(0.3, 0.3),
        advantages=torch.zeros(2),
        loss_mask=torch.ones(2, dtype=torch.bool),
    )
    policy_loss(inputs, 2, 1, config=AlgorithmConfig(kl_coef=1.0)).loss.backward()
    # d k3 / d(log pi) = 1 - pi_ref / pi = 0.4 and -0.5, over two tokens
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([0.2, -0.25], dtype=torch.float64))


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    old = logs(0.4, 0.2, 0.9).requires_grad_()
    weights = truncated_importance_weights(old - logs(0.2, 0.4, 0.1), 3.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64))
    assert not weights.requires_grad


def test_importance_weights_scale_the_policy_term_only() -> None:
    # pi = pi_old: policy term -A = -1, weight min(0.4 / 0.2, 1.5) = 1.5; KL of pi 0.4 to 0.2: k3 = 0.5 - 1 + log 2
    inputs = LossInputs(
        logprobs=logs(0.4),
        rollout_logprobs=logs(0.2),
        ref_logprobs=logs(0.2),
        advantages=torch.ones(1),
        loss_mask=torch.ones(1, dtype=torch.bool),
    )
    out = policy_loss(inputs, 1, 1, config=AlgorithmConfig(tis_cap=1.5, kl_coef=1.0))
    assert out.loss.item() == pytest.approx(-1.5 - 0.5 + math.log(2))
    assert out.metrics["tis_weight"].item() == 1.5


def test_mismatch_by_hand() -> None:
    inputs = LossInputs(
        logprobs=torch.tensor([-1.0, -2.0, -9.0]),
        rollout_logprobs=torch.tensor([-0.5, -2.25, 0.0]),
        advantages=torch.ones(3),
        loss_mask=torch.tensor([True, True, False]),
    )
    out = policy_loss(inputs, 2, 1, config=AlgorithmConfig())
    assert out.metrics["mismatch/mean_abs"].item() == 0.75
    assert out.maxima["mismatch/max_abs"].item() == 0.5
    expected = math.exp(-0.5) - 1 + 0.5 + math.exp(0.25) - 1 - 0.25
    assert out.metrics["mismatch/kl"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (AlgorithmConfig(kl_coef=0.1), "ref_logprobs"),
        (AlgorithmConfig(tis_cap=2.0), "rollout_logprobs"),
        (AlgorithmConfig(aggregation="seq_mean"), "tokens_in_sequence"),
    ],
)
def test_a_missing_input_is_named(config: AlgorithmConfig, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        policy_loss(four_tokens(), 4, 1, config=config)


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"advantages has shape \[1\], loss_mask \[4\]"):
        policy_loss(replace(four_tokens(), advantages=torch.ones(1)), 4, 1, config=AlgorithmConfig())


def test_entropy_bonus_by_hand() -> None:
    """loss = mean(-A) - 0.5 mean(H): at ratio 1, A = (1, 3) and H = (0.2, 0.6), -2 - 0.5 x 0.4 = -2.2."""
    entropy = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logprobs=logs(0.5, 0.25).requires_grad_(),
        advantages=torch.tensor([1.0, 3.0], dtype=torch.float64),
        loss_mask=torch.ones(2, dtype=torch.bool),
        entropy=entropy,
    )
    out = policy_loss(inputs, 2, 1, config=AlgorithmConfig(entropy_coef=0.5))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-2.2)
    assert out.metrics["entropy"].item() == pytest.approx(0.8)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [-0.25, -0.25]  # more entropy lowers the loss
    without = policy_loss(inputs, 2, 1, config=AlgorithmConfig())
    assert without.loss.item() == pytest.approx(-2.0)
