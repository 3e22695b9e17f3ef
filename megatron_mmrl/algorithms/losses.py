"""The clipped policy-gradient loss of PPO, GRPO and DAPO: one function, variants are its numbers.

loss = sum_t -w_t min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef KL_t - entropy_coef H_t, over
a global count,
with rho_t = pi / pi_old of the drawn token and w_t the truncated importance weight (1 when off).

PPO: arXiv 1707.06347, equation 7; GRPO: arXiv 2402.03300, equation 3; DAPO: arXiv 2503.14476, equation 8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from megatron_mmrl.algorithms.aggregate import seq_mean, token_mean
from megatron_mmrl.algorithms.corrections import truncated_importance_weights
from megatron_mmrl.algorithms.kl import KL_ESTIMATORS, k3
from megatron_mmrl.config.algorithm import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tokens of one micro-batch, all [T]; what stands outside the mask is never read, NaN included."""

    logprobs: Tensor  # log pi, nats, float32, with gradient
    advantages: Tensor
    loss_mask: Tensor  # bool
    old_logprobs: Tensor | None = None  # None: pi_old is pi itself (the first and only update of a rollout)
    ref_logprobs: Tensor | None = None  # needed when kl_coef > 0
    rollout_logprobs: Tensor | None = None  # the engine's; needed when tis_cap is set
    entropy: Tensor | None = None  # H of pi at the token, nats, with gradient; needed when entropy_coef > 0
    tokens_in_sequence: Tensor | None = None  # needed for seq_mean; see aggregate.count_tokens_in_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """This micro-batch's share of the loss, and what to log of it."""

    loss: Tensor  # scalar, with gradient; summed over micro-batches and ranks it is the mini-batch's loss
    metrics: Mapping[str, Tensor]  # sums over loss tokens, float64, no gradient; / num_loss_tokens: mean
    maxima: Mapping[str, Tensor] = field(default_factory=dict)  # largest value over loss tokens


LossFn = Callable[[LossInputs, int, int], LossOutput]
"""(inputs, num_loss_tokens, num_sequences) -> this micro-batch's share; the counts are global."""


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho) A) per token, and where the clip took the gradient away (bool); all [T].

    ``log_ratio`` = log pi - log pi_old. The clip acts on tokens that already moved further than allowed in the
    direction of their advantage: rho > 1 + clip_high with A > 0, rho < 1 - clip_low with A < 0.
    """
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -unclipped.minimum(clipped), clipped.detach() < unclipped.detach()


def policy_loss(inputs: LossInputs, num_loss_tokens: int, num_sequences: int, *, config: AlgorithmConfig) -> LossOutput:
    """The module's formula on one micro-batch, divided by the global counts of its mini-batch.

    Metrics: ``clip_fraction``; ``ratio``; ``policy_kl`` (k3, pi_old to pi); ``kl`` (to the reference, by
    ``kl_estimator``; 0 without one); ``entropy`` where it is given. With truncated importance sampling
    ``tis_weight``; with the engine's log-probs ``mismatch/mean_abs`` and ``mismatch/kl`` (k3) of pi_old against them,
    and the maximum ``mismatch/max_abs``.

    Raises:
        ValueError: an input that the configuration needs is None, shapes differ, or a count is not positive.
    """
    _check(inputs, config)
    tokens = _loss_tokens(inputs)
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.logprobs - old
    loss, clipped = clipped_surrogate(
        log_ratio, tokens.advantages, clip_low=config.clip_low, clip_high=config.clip_high
    )
    per_token = {"clip_fraction": clipped, "ratio": log_ratio.exp(), "policy_kl": k3(log_ratio)}
    per_token["kl"] = log_ratio.new_zeros(len(log_ratio))
    if tokens.ref_logprobs is not None:
        per_token["kl"] = KL_ESTIMATORS[config.kl_estimator](tokens.ref_logprobs - tokens.logprobs)
    maxima = {}
    if tokens.rollout_logprobs is not None:
        gap = old - tokens.rollout_logprobs
        per_token |= {"mismatch/mean_abs": gap.abs(), "mismatch/kl": k3(gap)}
        maxima["mismatch/max_abs"] = gap.abs().max().double() if len(gap) else gap.double().sum()
    if config.tis_cap is not None:
        assert tokens.rollout_logprobs is not None  # _check
        per_token["tis_weight"] = truncated_importance_weights(old, tokens.rollout_logprobs, config.tis_cap)
        loss = loss * per_token["tis_weight"]
    if config.kl_coef > 0:
        loss = loss + config.kl_coef * per_token["kl"]
    if tokens.entropy is not None:
        per_token["entropy"] = tokens.entropy
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * tokens.entropy
    if config.aggregation == "seq_mean":
        assert tokens.tokens_in_sequence is not None  # _check
        total = seq_mean(loss, tokens.tokens_in_sequence, num_sequences)
    else:
        total = token_mean(loss, num_loss_tokens)
    return LossOutput(
        loss=total, metrics={name: x.detach().double().sum() for name, x in per_token.items()}, maxima=maxima
    )


def _check(inputs: LossInputs, config: AlgorithmConfig) -> None:
    needs = (
        ("ref_logprobs", config.kl_coef > 0, f"algorithm.kl_coef={config.kl_coef}"),
        ("entropy", config.entropy_coef > 0, f"algorithm.entropy_coef={config.entropy_coef}"),
        ("rollout_logprobs", config.tis_cap is not None, f"algorithm.tis_cap={config.tis_cap}"),
        ("tokens_in_sequence", config.aggregation == "seq_mean", "algorithm.aggregation=seq_mean"),
    )
    for name, needed, why in needs:
        if needed and getattr(inputs, name) is None:
            raise ValueError(f"{why} needs {name}, which the loss was not given")
    for name, tensor in _tensors(inputs).items():
        if tensor.shape != inputs.loss_mask.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, loss_mask {list(inputs.loss_mask.shape)}")


def _tensors(inputs: LossInputs) -> dict[str, Tensor]:
    values = {item.name: getattr(inputs, item.name) for item in fields(inputs)}
    return {name: tensor for name, tensor in values.items() if tensor is not None}


def _loss_tokens(inputs: LossInputs) -> LossInputs:
    """Only the tokens that are learned from, [N]: what is masked cannot reach a sum or a gradient."""
    return replace(inputs, **{name: tensor[inputs.loss_mask] for name, tensor in _tensors(inputs).items()})
