"""Cross entropy of given target tokens, in the form of the policy losses."""

from __future__ import annotations

from megatron_mmrl.algorithms.aggregate import token_mean
from megatron_mmrl.algorithms.losses import LossInputs, LossOutput


def supervised_loss(inputs: LossInputs, num_loss_tokens: int, num_sequences: int) -> LossOutput:
    """-log pi of every target token / the global number of target tokens; no metrics of its own."""
    nll = -inputs.logprobs[inputs.loss_mask]
    return LossOutput(loss=token_mean(nll, num_loss_tokens), metrics={})
