"""Random tokens of four packed sequences, the variants of the loss, and each variant's formula written out plainly."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from megatron_mmrl.algorithms.aggregate import count_tokens_in_sequence, sequence_numbers
from megatron_mmrl.algorithms.losses import LossInputs
from megatron_mmrl.config.algorithm import AlgorithmConfig, MismatchMaskConfig

LENGTHS = (3, 5, 2, 6)
BOUNDS = np.cumsum((0, *LENGTHS))

VARIANTS = {
    "clip": AlgorithmConfig(clip_high=0.28),
    "dual clip": AlgorithmConfig(dual_clip=1.5),
    "seq mean": AlgorithmConfig(aggregation="seq_mean"),
    "dr_grpo": AlgorithmConfig(name="dr_grpo", aggregation="fixed_length", aggregation_length=7),
    "gspo": AlgorithmConfig(name="gspo", aggregation="seq_mean", clip_low=0.1, clip_high=0.1),
    "cispo": AlgorithmConfig(name="cispo", clip_low=1.0, clip_high=0.28),
    "k1": AlgorithmConfig(kl_coef=0.3, kl_estimator="k1"),
    "k2": AlgorithmConfig(kl_coef=0.3, kl_estimator="k2"),
    "k3": AlgorithmConfig(kl_coef=0.3, kl_estimator="k3"),
    "k3_unbiased": AlgorithmConfig(kl_coef=0.3, kl_estimator="k3_unbiased"),
    "kl in reward": AlgorithmConfig(kl_coef=0.3, kl_estimator="k1", kl_in="reward"),
    "entropy": AlgorithmConfig(entropy_coef=0.2),
    "tis": AlgorithmConfig(tis_cap=1.1),
    "token mask": AlgorithmConfig(mismatch_mask=MismatchMaskConfig(level="token", low=0.7, high=1.3)),
    "sequence mask": AlgorithmConfig(mismatch_mask=MismatchMaskConfig(level="sequence", low=0.95, high=1.05)),
    "everything": AlgorithmConfig(
        aggregation="seq_mean", kl_coef=0.1, entropy_coef=0.1, tis_cap=1.2, dual_clip=2.0,
        mismatch_mask=MismatchMaskConfig(level="sequence", low=0.8, high=1.4),
    ),
}  # fmt: skip


def random_inputs(seed: int = 0) -> LossInputs:
    """Four sequences packed, the first token of each masked; every optional tensor is there, in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def draw() -> Tensor:
        return -torch.rand(total, generator=generator, dtype=torch.float64) - 0.1

    mask = torch.rand(total, generator=generator) < 0.7
    mask[BOUNDS[:-1]] = False
    mask[BOUNDS[1:] - 1] = True
    return LossInputs(
        logprobs=draw().requires_grad_(),
        old_logprobs=draw(),
        ref_logprobs=draw(),
        rollout_logprobs=draw(),
        advantages=torch.randn(total, generator=generator, dtype=torch.float64),
        loss_mask=mask,
        entropy=torch.rand(total, generator=generator, dtype=torch.float64),
        sequence=torch.from_numpy(sequence_numbers(BOUNDS)),
        tokens_in_sequence=torch.from_numpy(count_tokens_in_sequence(mask.numpy(), BOUNDS.astype(np.int32))),
    )


def cut(inputs: LossInputs, tokens: slice | Tensor) -> LossInputs:
    """The same with some of its tokens only."""
    return replace(inputs, **{f.name: v[tokens] for f in fields(inputs) if (v := getattr(inputs, f.name)) is not None})


def plain_loss(inputs: LossInputs, config: AlgorithmConfig, num_sequences: int = 4) -> Tensor:
    """The loss of a whole mini-batch, sequence by sequence and token by token, as the papers print it."""
    responses = [
        [int(token) for token in range(BOUNDS[i], BOUNDS[i + 1]) if inputs.loss_mask[token]]
        for i in range(len(LENGTHS))
    ]
    per_response = [[_token(inputs, config, response, token) for token in response] for response in responses]
    sums = [sum(losses) for losses in per_response]
    if config.aggregation == "seq_mean":
        return sum(total / len(losses) for total, losses in zip(sums, per_response, strict=True)) / num_sequences
    if config.aggregation == "fixed_length":
        return sum(total / config.aggregation_length for total in sums) / num_sequences
    return sum(sums) / sum(len(losses) for losses in per_response)


def _token(inputs: LossInputs, config: AlgorithmConfig, response: list[int], token: int) -> Tensor:
    logp, old, advantage = inputs.logprobs, inputs.old_logprobs, inputs.advantages[token]
    ratio = torch.exp(logp[token] - old[token])
    if config.name == "gspo":
        ratio = torch.exp(sum(logp[t] - old[t] for t in response) / len(response))  # all of it, with its gradient
    bounded = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
    objective = torch.min(ratio * advantage, bounded * advantage)
    if config.dual_clip is not None and advantage < 0:
        objective = torch.max(objective, config.dual_clip * advantage)
    if config.name == "cispo":
        objective = bounded.detach() * advantage * logp[token]
    objective = objective * _weight(inputs, config, response, token)
    if config.kl_in == "loss" and config.kl_coef > 0:
        objective = objective - config.kl_coef * _kl(inputs.ref_logprobs[token], logp[token], config.kl_estimator)
    return -objective - config.entropy_coef * inputs.entropy[token]


def _weight(inputs: LossInputs, config: AlgorithmConfig, response: list[int], token: int) -> float:
    gaps = {t: float(inputs.old_logprobs[t] - inputs.rollout_logprobs[t]) for t in response}
    weight = 1.0 if config.tis_cap is None else min(np.exp(gaps[token]), config.tis_cap)
    mask = config.mismatch_mask
    judged = {"none": 1.0, "token": np.exp(gaps[token]), "sequence": np.exp(np.mean(list(gaps.values())))}[mask.level]
    return weight if mask.level == "none" or mask.low <= judged <= mask.high else 0.0


def _kl(ref: Tensor, logp: Tensor, estimator: str) -> Tensor:
    d = ref - logp
    if estimator == "k3_unbiased":
        return (torch.exp(d) - 1 - d).detach() + (d**2 / 2 - (d**2 / 2).detach())
    return {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - 1 - d}[estimator]
