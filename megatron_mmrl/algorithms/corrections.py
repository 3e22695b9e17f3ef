"""Engine and trainer never agree to the last bit: how far apart they are, and how to correct for it.

Both act on the policy term of the loss only, carry no gradient, and leave the denominators alone: a token that is
masked out adds 0 but is still counted, so that ranks need not talk about masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mmrl.algorithms.aggregate import sequence_mean_of

if TYPE_CHECKING:
    from torch import Tensor


def truncated_importance_weights(gap: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_rollout, cap) per token [T], without gradient: a factor of the policy term only.

    ``gap`` [T] = log pi_old - log pi_rollout, nats: the trainer's and the engine's log-probs of the same tokens under
    what should be the same weights. The ratio corrects for what differs; the cap bounds the variance (truncated
    importance sampling, Ionides 2008).
    """
    return gap.exp().clamp(max=cap).detach()


def within_bounds(gap: Tensor, low: float, high: float) -> Tensor:
    """Bool [T]: low <= pi_old / pi_rollout <= high, of each token.

    Masked importance sampling, as IcePop does it (Ring-1T, arXiv 2510.18855): what the engine sampled with
    a very different probability teaches nothing.
    """
    ratio = gap.detach().exp()
    return (ratio >= low) & (ratio <= high)


def sequences_within_bounds(
    gap: Tensor, sequence: Tensor, tokens_in_sequence: Tensor, low: float, high: float
) -> Tensor:
    """Bool [T]: the same of whole responses, by the geometric mean of their tokens' ratios.

    The mean and not the product, whose spread grows with the length, so that one pair of bounds serves all lengths.
    ``sequence`` i64[T]: number of the response that a token belongs to; see ``aggregate.sequence_mean_of``.
    """
    return within_bounds(sequence_mean_of(gap.detach(), sequence, tokens_in_sequence), low, high)
