"""The policy-gradient loss of one micro-batch: one function, whose variants are its numbers and its surrogate.

loss = sum_t m_t w_t l_t + kl_coef KL_t - entropy_coef H_t, over a global count, with l_t the surrogate of a token
(``surrogates.py``), w_t and m_t the importance weight and mask for the engine's mismatch (``corrections.py``; 1 when
off), KL_t to the reference model (``kl.py``) and H_t the entropy. How tokens are summed: ``aggregate.py``.

GRPO: arXiv 2402.03300, equation 3; docs/algorithm.md has the table of names, formulas and papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from megatron_mmrl.algorithms.aggregate import fixed_length, seq_mean, token_mean
from megatron_mmrl.algorithms.corrections import (
    sequences_within_bounds,
    truncated_importance_weights,
    within_bounds,
)
from megatron_mmrl.algorithms.kl import KL_ESTIMATORS, k3
from megatron_mmrl.algorithms.surrogates import clipped_surrogate, detached_surrogate, sequence_log_ratio
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
    ref_logprobs: Tensor | None = None  # needed for a KL in the loss
    rollout_logprobs: Tensor | None = None  # the engine's; needed when tis_cap or mismatch_mask is set
    entropy: Tensor | None = None  # H of pi at the token, nats, with gradient; needed when entropy_coef > 0
    sequence: Tensor | None = None  # i64, number of the token's sequence; needed where whole responses are weighed
    tokens_in_sequence: Tensor | None = None  # needed there and for seq_mean; see aggregate.count_tokens_in_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """This micro-batch's share of the loss, and what to log of it."""

    loss: Tensor  # scalar, with gradient; summed over micro-batches and ranks it is the mini-batch's loss
    metrics: Mapping[str, Tensor]  # sums over loss tokens, float64, no gradient; / num_loss_tokens: mean
    maxima: Mapping[str, Tensor] = field(default_factory=dict)  # largest value over loss tokens


LossFn = Callable[[LossInputs, int, int], LossOutput]
"""(inputs, num_loss_tokens, num_sequences) -> this micro-batch's share; the counts are global."""

Surrogate = Callable[[LossInputs, "Tensor", AlgorithmConfig], "tuple[Tensor, Tensor]"]
"""(loss tokens, log pi - log pi_old, config) -> loss of each token and whether the bounds act on it, both [N]."""


def token_ratios(tokens: LossInputs, log_ratio: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """PPO, GRPO, DAPO: the ratio of each token is clipped."""
    return clipped_surrogate(
        log_ratio,
        tokens.advantages,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )


def sequence_ratios(tokens: LossInputs, log_ratio: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """GSPO: the same with the geometric mean of a response's ratios in place of each of them."""
    sequence, count = _whole_sequences(tokens, "algorithm.name=gspo")
    return token_ratios(tokens, sequence_log_ratio(log_ratio, sequence, count), config)


def detached_ratios(tokens: LossInputs, log_ratio: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """CISPO: the clipped ratio is a weight of the log-prob."""
    return detached_surrogate(
        tokens.logprobs, log_ratio, tokens.advantages, clip_low=config.clip_low, clip_high=config.clip_high
    )


def policy_loss(
    inputs: LossInputs,
    num_loss_tokens: int,
    num_sequences: int,
    *,
    config: AlgorithmConfig,
    surrogate: Surrogate = token_ratios,
) -> LossOutput:
    """The module's formula on one micro-batch, divided by the global counts of its mini-batch.

    Where ``config.aggregation`` is unset it is ``token_mean``; names of the registry set it.

    Metrics: ``clip_fraction``; ``ratio``; ``policy_kl`` (k3, pi_old to pi); ``kl`` (to the reference, by
    ``kl_estimator``; 0 without one); ``entropy`` where it is given. With the engine's log-probs
    ``mismatch/mean_abs`` and ``mismatch/kl`` (k3) of pi_old against them, the maximum ``mismatch/max_abs``, and where
    they are used ``tis_weight``, ``tis_capped`` and ``mismatch/masked`` (share of tokens).

    Raises:
        ValueError: an input that the configuration needs is None, shapes differ, or a count is not positive.
    """
    _check(inputs, config)
    tokens = _loss_tokens(inputs)
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.logprobs - old
    loss, clipped = surrogate(tokens, log_ratio, config)
    per_token = {"clip_fraction": clipped, "ratio": log_ratio.exp(), "policy_kl": k3(log_ratio)}
    per_token["kl"] = log_ratio.new_zeros(len(log_ratio))
    if tokens.ref_logprobs is not None:
        per_token["kl"] = KL_ESTIMATORS[config.kl_estimator](tokens.ref_logprobs - tokens.logprobs)
    maxima = {}
    if tokens.rollout_logprobs is not None:
        gap = old - tokens.rollout_logprobs
        per_token |= {"mismatch/mean_abs": gap.abs(), "mismatch/kl": k3(gap)}
        maxima["mismatch/max_abs"] = gap.abs().max().double() if len(gap) else gap.double().sum()
        loss, corrected = _corrected(loss, tokens, gap, config)
        per_token |= corrected
    if config.kl_coef > 0 and config.kl_in == "loss":
        loss = loss + config.kl_coef * per_token["kl"]
    if tokens.entropy is not None:
        per_token["entropy"] = tokens.entropy
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * tokens.entropy
    return LossOutput(
        loss=_aggregated(loss, tokens, num_loss_tokens, num_sequences, config),
        metrics={name: x.detach().double().sum() for name, x in per_token.items()},
        maxima=maxima,
    )


def _corrected(
    loss: Tensor, tokens: LossInputs, gap: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy term after weight and mask, and what to log of them; ``gap`` = log pi_old - log pi_rollout."""
    metrics: dict[str, Tensor] = {}
    mask = config.mismatch_mask
    if config.tis_cap is not None:
        weight = truncated_importance_weights(gap, config.tis_cap)
        metrics |= {"tis_weight": weight, "tis_capped": weight == config.tis_cap}
        loss = loss * weight
    if mask.level != "none":
        if mask.level == "token":
            good = within_bounds(gap, mask.low, mask.high)
        else:
            sequence, count = _whole_sequences(tokens, "algorithm.mismatch_mask.level=sequence")
            good = sequences_within_bounds(gap, sequence, count, mask.low, mask.high)
        metrics["mismatch/masked"] = ~good
        loss = loss * good
    return loss, metrics


def _aggregated(
    loss: Tensor, tokens: LossInputs, num_loss_tokens: int, num_sequences: int, config: AlgorithmConfig
) -> Tensor:
    if config.aggregation == "seq_mean":
        assert tokens.tokens_in_sequence is not None  # _check
        return seq_mean(loss, tokens.tokens_in_sequence, num_sequences)
    if config.aggregation == "fixed_length":
        assert config.aggregation_length is not None  # _check
        return fixed_length(loss, config.aggregation_length, num_sequences)
    return token_mean(loss, num_loss_tokens)


def _check(inputs: LossInputs, config: AlgorithmConfig) -> None:
    needs = (
        ("ref_logprobs", config.kl_coef > 0 and config.kl_in == "loss", f"algorithm.kl_coef={config.kl_coef}"),
        ("entropy", config.entropy_coef > 0, f"algorithm.entropy_coef={config.entropy_coef}"),
        ("rollout_logprobs", config.tis_cap is not None, f"algorithm.tis_cap={config.tis_cap}"),
        ("rollout_logprobs", config.mismatch_mask.level != "none", "algorithm.mismatch_mask"),
        ("tokens_in_sequence", config.aggregation == "seq_mean", "algorithm.aggregation=seq_mean"),
    )
    if config.aggregation == "fixed_length" and config.aggregation_length is None:
        raise ValueError("algorithm.aggregation=fixed_length needs algorithm.aggregation_length")
    for name, needed, why in needs:
        if needed and getattr(inputs, name) is None:
            raise ValueError(f"{why} needs {name}, which the loss was not given")
    for name, tensor in _tensors(inputs).items():
        if tensor.shape != inputs.loss_mask.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, loss_mask {list(inputs.loss_mask.shape)}")


def _whole_sequences(tokens: LossInputs, why: str) -> tuple[Tensor, Tensor]:
    if tokens.sequence is None or tokens.tokens_in_sequence is None:
        raise ValueError(f"{why} needs sequence and tokens_in_sequence, which the loss was not given")
    return tokens.sequence, tokens.tokens_in_sequence


def _tensors(inputs: LossInputs) -> dict[str, Tensor]:
    values = {item.name: getattr(inputs, item.name) for item in fields(inputs)}
    return {name: tensor for name, tensor in values.items() if tensor is not None}


def _loss_tokens(inputs: LossInputs) -> LossInputs:
    """Only the tokens that are learned from, [N]: what is masked cannot reach a sum or a gradient."""
    return replace(inputs, **{name: tensor[inputs.loss_mask] for name, tensor in _tensors(inputs).items()})
