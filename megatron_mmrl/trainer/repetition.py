"""The repetition penalty of sampling, as a change of the logits that the trainer can follow and differentiate.

SGLang (0.5.20) divides the logit of each token that the response already holds by the penalty, or multiplies it where
it is negative (CTRL, arXiv 1909.05858, section 4.1, with the sign mended), before temperature and softmax; tokens of
the prompt do not count. So a row's distribution depends on which tokens its response had until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PastTokens:
    """The distinct tokens of one response, and which of the neighbouring rows of logits have them behind them."""

    rows: slice  # rows that predict tokens of this response
    places: Tensor  # i64[R], of each row: how many tokens of the response come before what it predicts
    tokens: NDArray[np.int64]  # [U], ascending
    first: Tensor  # i64[U], place at which each of them stands first


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A part of a tile of logits, and what each of its entries is multiplied by."""

    rows: slice
    columns: Tensor  # i64[K]
    factor: Tensor  # [rows, K]

    def apply(self, matrix: Tensor) -> None:
        """Multiply in place; for the gradient of what was multiplied, the same."""
        part = matrix[self.rows]
        part.index_copy_(1, self.columns, part.index_select(1, self.columns) * self.factor.to(matrix.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """The penalty of all responses of a micro-batch."""

    penalty: float
    responses: tuple[PastTokens, ...]

    def patches(self, logits: Tensor, rows: slice, columns: slice) -> Iterator[Patch]:
        """What the penalty changes in logits [C, W] of these rows and vocabulary columns; positive scales commute."""
        for past in self.responses:
            start, stop = max(rows.start, past.rows.start), min(rows.stop, past.rows.stop)
            low, high = np.searchsorted(past.tokens, (columns.start, columns.stop))
            if start >= stop or low == high:
                continue
            here = slice(start - rows.start, stop - rows.start)
            found = torch.from_numpy(past.tokens[low:high] - columns.start).to(logits.device)
            places = past.places[start - past.rows.start : stop - past.rows.start]
            seen = places[:, None] > past.first[None, low:high]
            values = logits[here].index_select(1, found)
            up, down = values.new_tensor((self.penalty, 1 / self.penalty))  # in the dtype of the logits
            yield Patch(rows=here, columns=found, factor=torch.where(values < 0, up, down).where(seen, 1.0))


def repetition_of(
    input_ids: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    cu_seqlens: NDArray[np.int32],
    own: NDArray[np.int64],
    *,
    penalty: float,
    device: torch.device,
) -> Repetition | None:
    """The penalty for the rows that predict a micro-batch's loss tokens, which are its responses.

    Args:
        input_ids: [T], as loss_mask; cu_seqlens i32[S + 1].
        own: which of the loss tokens this rank has rows for, ascending; row k predicts loss token ``own[k]``.

    Returns:
        None for penalty 1, which changes nothing.
    """
    if penalty == 1.0:
        return None
    loss_tokens = np.flatnonzero(loss_mask)
    bounds = np.searchsorted(loss_tokens, cu_seqlens)  # of each sequence, in loss tokens
    rows = np.searchsorted(own, bounds)  # and in rows
    responses = []
    for number in np.flatnonzero(np.diff(rows)):
        begin, end = bounds[number], bounds[number + 1]
        tokens, first = np.unique(input_ids[loss_tokens[begin:end]], return_index=True)
        responses.append(
            PastTokens(
                rows=slice(int(rows[number]), int(rows[number + 1])),
                places=torch.from_numpy(own[rows[number] : rows[number + 1]] - begin).to(device),
                tokens=tokens,
                first=torch.from_numpy(first).to(device),
            )
        )
    return Repetition(penalty=penalty, responses=tuple(responses))
