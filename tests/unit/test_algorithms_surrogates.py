"""Every variant of the loss: by hand, against its formula written out, and against what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mmrl.algorithms.aggregate import fixed_length, sequence_mean_of, sequence_numbers
from megatron_mmrl.algorithms.corrections import sequences_within_bounds, within_bounds
from megatron_mmrl.algorithms.kl import k2, k3, k3_unbiased
from megatron_mmrl.algorithms.losses import LossFn, LossInputs, policy_loss
from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.algorithms.surrogates import clipped_surrogate, detached_surrogate, sequence_log_ratio
from megatron_mmrl.config.algorithm import AlgorithmConfig
from tests.unit.loss_case import BOUNDS, LENGTHS, VARIANTS, cut, plain_loss, random_inputs

EXACT = {"rtol": 1e-12, "atol": 1e-15}


def loss_of(name: str) -> LossFn:
    return build_algorithm(VARIANTS[name]).loss


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dual_clip_by_hand() -> None:
    # A = -1: max(min(-rho, -clip(rho)), -2), rho 4 -> -2, so the loss is 2 and nothing pulls; rho 1.5 -> loss 1.5
    # A = 1 is not touched: rho 4 -> 1.2
    log_ratio = float64(4.0, 1.5, 4.0).log().requires_grad_()
    loss, active = clipped_surrogate(log_ratio, float64(-1, -1, 1), clip_low=0.2, clip_high=0.2, dual_clip=2.0)
    torch.testing.assert_close(loss, float64(2.0, 1.5, -1.2))
    assert active.tolist() == [True, False, True]
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, float64(0, 1.5, 0))


def test_gspo_by_hand() -> None:
    # ratios of the first response 2 and 1/2: geometric mean 1; of the second 1.21 and 1: 1.1
    log_ratio = float64(2.0, 0.5, 1.21, 1.0).log().requires_grad_()
    sequence, count = torch.tensor([0, 0, 1, 1]), torch.full((4,), 2.0)
    s = sequence_log_ratio(log_ratio, sequence, count).exp()
    torch.testing.assert_close(s, float64(1, 1, 1.1, 1.1))
    s[3].backward()  # s_{i,t} carries the gradient of its own token only
    torch.testing.assert_close(log_ratio.grad, float64(0, 0, 0, 1.1))


def test_cispo_by_hand() -> None:
    # rho 2 is weighed 1.2, rho 0.5 is weighed 0.8, and both keep their gradient -w A
    logprobs = float64(0.5, 0.25).log().requires_grad_()
    log_ratio = logprobs - float64(0.25, 0.5).log()
    loss, active = detached_surrogate(logprobs, log_ratio, float64(1, -3), clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(loss, float64(-1.2 * math.log(0.5), 2.4 * math.log(0.25)))
    assert active.tolist() == [True, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, float64(-1.2, 2.4))
    _, active = detached_surrogate(logprobs, log_ratio, float64(1, -3), clip_low=1.0, clip_high=0.2)
    assert active.tolist() == [True, False]  # clip_low=1: no lower bound


def test_fixed_length_by_hand() -> None:
    # 1 + 3 + 8 over 2 responses of (up to) 10 tokens; 3 tokens or 2 do not matter
    assert fixed_length(float64(1, 3, 8), 10, 2).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="num_sequences=0"):
        fixed_length(float64(1), 10, 0)


def test_sequence_means_by_hand() -> None:
    assert sequence_numbers(np.array([0, 2, 2, 5])).tolist() == [0, 0, 2, 2, 2]
    means = sequence_mean_of(float64(1, 8, 3), torch.tensor([0, 2, 0]), torch.tensor([2.0, 1.0, 2.0]))
    assert means.tolist() == [2, 8, 2]
    assert sequence_mean_of(float64(), torch.zeros(0, dtype=torch.long), torch.zeros(0)).tolist() == []


def test_masks_by_hand() -> None:
    # ratios 4, 1/4 (mean 1) and 1.5, 1.5
    gap = float64(4, 0.25, 1.5, 1.5).log()
    assert within_bounds(gap, 0.5, 2.0).tolist() == [False, False, True, True]
    sequence, count = torch.tensor([0, 0, 1, 1]), torch.full((4,), 2.0)
    assert sequences_within_bounds(gap, sequence, count, 0.5, 1.4).tolist() == [True, True, False, False]


def test_what_is_masked_out_is_counted_and_reported() -> None:
    inputs = replace(
        random_inputs(), rollout_logprobs=random_inputs().old_logprobs - float64(*([5.0] * 3 + [0.0] * 13))
    )
    count = int(inputs.loss_mask.sum())
    for level in ("token mask", "sequence mask"):
        out = policy_loss(inputs, count, 4, config=VARIANTS[level])
        first = int(inputs.loss_mask[:3].sum())
        assert out.metrics["mismatch/masked"].item() == first
        rest = policy_loss(cut(inputs, slice(3, None)), count, 4, config=AlgorithmConfig())
        torch.testing.assert_close(out.loss, rest.loss, **EXACT)
    capped = policy_loss(inputs, count, 4, config=AlgorithmConfig(tis_cap=1.5))
    assert capped.metrics["tis_capped"].item() == first


def test_unbiased_kl_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    p, q = float64(0.5, 0.3, 0.2), float64(0.3, 0.3, 0.4)
    gradients = {}
    for estimator in (k2, k3, k3_unbiased):
        logits = p.log().requires_grad_()
        logp = logits.log_softmax(0)
        expected = (p * estimator(q.log() - logp)).sum()  # tokens drawn from p, which is held fixed
        gradients[estimator] = torch.autograd.grad(expected, logits)[0]
        if estimator is not k2:
            torch.testing.assert_close(expected, (p * (p / q).log()).sum())
    logits = p.log().requires_grad_()
    logp = logits.log_softmax(0)
    (true,) = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits)
    torch.testing.assert_close(gradients[k3_unbiased], true)
    assert (gradients[k3] - true).abs().max() > 0.01  # k3 as a loss does not descend the KL


def one_advantage_each(inputs: LossInputs) -> LossInputs:
    """As GSPO has it: one advantage for a response."""
    return replace(inputs, advantages=inputs.advantages[torch.from_numpy(BOUNDS[:-1])][inputs.sequence])


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_are_those_of_the_plain_formula(name: str) -> None:
    ours, plain = random_inputs(), random_inputs()
    if VARIANTS[name].name == "gspo":
        ours, plain = one_advantage_each(ours), one_advantage_each(plain)
    ours.entropy.requires_grad_(), plain.entropy.requires_grad_()
    out = loss_of(name)(ours, int(ours.loss_mask.sum()), 4)
    expected = plain_loss(plain, VARIANTS[name])
    torch.testing.assert_close(out.loss, expected, **EXACT)
    out.loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.logprobs.grad, plain.logprobs.grad, **EXACT)
    if VARIANTS[name].entropy_coef:
        torch.testing.assert_close(ours.entropy.grad, plain.entropy.grad, **EXACT)
    assert ours.logprobs.grad.abs().sum() > 0
    assert all(getattr(ours, other).grad is None for other in ("old_logprobs", "ref_logprobs", "rollout_logprobs"))


# Stop-gradients make these two: their gradient is not that of their value. The plain formulas above are their check.
DETACHED = ("cispo", "k3_unbiased")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in DETACHED])
def test_the_bounds_are_where_finite_differences_say(name: str) -> None:
    """Autograd against the loss itself: (L(x + h) - L(x - h)) / 2h; GSPO's tokens add up to the gradient of s_i."""
    inputs = random_inputs(seed=3)
    inputs = one_advantage_each(inputs) if name == "gspo" else inputs
    loss = loss_of(name)
    loss(inputs, 9, 4).loss.backward()
    for token in inputs.loss_mask.nonzero().flatten().tolist():
        ends = []
        for h in (1e-6, -1e-6):
            moved = inputs.logprobs.detach().clone()
            moved[token] += h
            ends.append(loss(replace(inputs, logprobs=moved), 9, 4).loss.item())
        assert inputs.logprobs.grad[token].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("name", VARIANTS)
def test_neither_split_nor_order_nor_padding_change_it(name: str) -> None:
    loss, whole = loss_of(name), random_inputs()
    count = int(whole.loss_mask.sum())
    expected = loss(whole, count, 4)
    expected.loss.backward()

    split = random_inputs()  # micro-batches, or replicas: whole sequences each, global counts
    parts = [loss(cut(split, slice(BOUNDS[a], BOUNDS[b])), count, 4) for a, b in ((0, 1), (1, 3), (3, 4))]
    shuffled = random_inputs()
    order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    padded = random_inputs()
    hidden = ~padded.loss_mask
    dirty = {
        field: getattr(padded, field).detach().masked_fill(hidden, math.nan)
        for field in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "entropy")
    }
    dirty["logprobs"].requires_grad_()
    padded = replace(padded, **dirty)
    for inputs, outputs in (
        (split, parts),
        (shuffled, [loss(cut(shuffled, order), count, 4)]),
        (padded, [loss(padded, count, 4)]),
    ):
        total = sum(out.loss for out in outputs)
        torch.testing.assert_close(total, expected.loss, **EXACT)
        total.backward()
        torch.testing.assert_close(inputs.logprobs.grad, whole.logprobs.grad, **EXACT)
        for metric, value in expected.metrics.items():
            torch.testing.assert_close(sum(out.metrics[metric] for out in outputs), value, **EXACT)


@pytest.mark.parametrize("name", ["gspo", "cispo", "clip"])
def test_the_first_update_needs_no_old_log_probs(name: str) -> None:
    """pi_old is pi: all three descend -A grad log pi, GSPO with a mean over each response."""
    inputs = replace(random_inputs(), old_logprobs=None)
    given = replace(random_inputs(), old_logprobs=random_inputs().logprobs.detach())
    for each in (inputs, given):
        loss_of(name)(each, 10, 4).loss.backward()
    assert torch.equal(inputs.logprobs.grad, given.logprobs.grad)
    share = inputs.tokens_in_sequence * 4 if name == "gspo" else torch.full((16,), 10.0)
    expected = torch.where(inputs.loss_mask, -inputs.advantages / share, 0.0)
    torch.testing.assert_close(inputs.logprobs.grad, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["gspo", "sequence mask"])
def test_whole_responses_must_be_told_apart(name: str) -> None:
    with pytest.raises(ValueError, match="needs sequence"):
        loss_of(name)(replace(random_inputs(), sequence=None), 10, 4)


def test_fixed_length_needs_its_length() -> None:
    with pytest.raises(ValueError, match="aggregation_length"):
        policy_loss(random_inputs(), 10, 4, config=AlgorithmConfig(aggregation="fixed_length"))
