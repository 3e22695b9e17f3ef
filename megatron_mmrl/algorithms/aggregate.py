"""From losses per token to one number, with denominators that all ranks agree on.

What a micro-batch returns is its share of a sum: added over micro-batches and data-parallel ranks it is the loss
of the whole mini-batch. So gradient accumulation, data parallelism, packing and context parallelism cannot change
the gradient. (A framework that averages over ranks or micro-batches must be told not to.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def token_mean(token_loss: Tensor, num_loss_tokens: int) -> Tensor:
    """Share of the mean over all loss tokens: sum of token_loss [N] / num_loss_tokens (global).

    Raises:
        ValueError: ``num_loss_tokens`` is not positive.
    """
    if num_loss_tokens < 1:
        raise ValueError(f"num_loss_tokens={num_loss_tokens}: a mini-batch without loss tokens has no mean; skip it")
    return token_loss.sum() / num_loss_tokens


def seq_mean(token_loss: Tensor, tokens_in_sequence: Tensor, num_sequences: int) -> Tensor:
    """Share of the mean over sequences of each sequence's mean: the 1/G sum_i 1/|o_i| sum_t of the GRPO paper.

    ``token_loss`` [N] of loss tokens; ``tokens_in_sequence`` [N], how many loss tokens the whole sequence of each
    has (``count_tokens_in_sequence``); ``num_sequences`` counts globally those with at least one.

    Raises:
        ValueError: ``num_sequences`` is not positive.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences}: a mini-batch without sequences has no mean; skip it")
    return (token_loss / tokens_in_sequence).sum() / num_sequences


def fixed_length(token_loss: Tensor, length: int, num_sequences: int) -> Tensor:
    """Share of sum of token_loss [N] / (num_sequences x length): Dr. GRPO (arXiv 2503.20783).

    Divided by a constant, a token weighs the same in a long and in a short response. ``num_sequences`` counts globally
    those with at least one loss token.

    Raises:
        ValueError: ``num_sequences`` is not positive.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences}: a mini-batch without sequences has no mean; skip it")
    return token_loss.sum() / (num_sequences * length)


def sequence_mean_of(values: Tensor, sequence: Tensor, tokens_in_sequence: Tensor) -> Tensor:
    """Each token's [N] share in its sequence replaced by the mean over the sequence, [N], summed in float64.

    ``sequence`` i64[N]: number of the sequence, from 0, that a loss token belongs to; ``tokens_in_sequence`` [N] as
    in ``seq_mean``. All loss tokens of a sequence must be there.
    """
    num_sequences = int(sequence.max()) + 1 if len(sequence) else 0
    sums = values.double().new_zeros(num_sequences).index_add(0, sequence, values.double())
    return (sums[sequence] / tokens_in_sequence).to(values.dtype)


def count_tokens_in_sequence(loss_mask: NDArray[np.bool_], cu_seqlens: NDArray[np.int32]) -> NDArray[np.float32]:
    """For each token of loss_mask [T], the number of loss tokens of the sequence it belongs to, [T].

    ``cu_seqlens`` [S + 1] are the bounds of the sequences and must cover all T tokens. For padded rows of length L
    these are 0, L, 2 L, ... It is counted before a sequence is cut over context-parallel ranks.

    Raises:
        ValueError: the bounds do not start at 0 or do not end at T.
    """
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(loss_mask):
        raise ValueError(
            f"cu_seqlens run from {cu_seqlens[0]} to {cu_seqlens[-1]}, the mask from 0 to {len(loss_mask)}"
        )
    before = np.concatenate(([0], np.cumsum(loss_mask)))
    counts = before[cu_seqlens[1:]] - before[cu_seqlens[:-1]]
    return np.repeat(counts, np.diff(cu_seqlens)).astype(np.float32)


def sequence_numbers(cu_seqlens: NDArray[np.int32]) -> NDArray[np.int64]:
    """For each token, the number of the sequence it belongs to, i64[T]; see ``count_tokens_in_sequence``."""
    return np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
