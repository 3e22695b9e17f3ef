"""How each weight is cut over tensor-parallel ranks, in Megatron's layout. Pure: tensors in, tensors out.

NumPy arrays, which stand for tensors where a plan is made (``geometry.py``), are cut as well, without loading torch.

A rule turns one or several full tensors (as Hugging Face names them) into a rank's shard, and the shards of all ranks
back. Round trips are bit-exact. ``split`` reads its input only through ``shape`` and slices, so that a file can stand
for a tensor and a rank loads only its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_mmrl.config.checks import require

if TYPE_CHECKING:
    from torch import Tensor


class Sliceable(Protocol):
    """A tensor, or what reads as one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Any: ...


class Rule(Protocol):
    """One way of sharding. Rules are values: what follows from one is kept by it."""

    def __hash__(self) -> int: ...

    def split(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        """The shard of tensor-parallel rank ``rank`` of ``size``."""
        ...

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The full tensors from all shards in rank order; those of one rank may share its memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """A row of a model's weight table: what one local parameter is made of."""

    hf_names: tuple[str, ...]
    """Tensors of the checkpoint, in the order that the rule expects; named as in ``models/hf_io.py``."""
    rule: Rule
    exported: bool = True
    """False for a second copy of a tensor that another parameter exports."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds all of it."""

    def split(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return full[0][:]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True, slots=True)
class Row:
    """Input features (columns of the weight matrix) are divided."""

    def split(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return full[0][:, _part(full[0].shape[1], rank, size)]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_join(shards, 1),)


@dataclass(frozen=True, slots=True)
class QKV:
    """Queries, keys and values in one tensor, group by group: ``[q .. q, k, v]`` for each key/value head.

    Weights [heads * head_dim, hidden] and biases [heads * head_dim] alike. A rank has an equal share of the rows, which
    is a number of whole groups unless there are more ranks than groups: then borders lie anywhere, and Megatron gathers
    the output before it takes the rank's heads.
    """

    heads: int
    groups: int
    head_dim: int

    def split(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        share = _part(sum(tensor.shape[0] for tensor in full), rank, size)
        pieces, place = [], 0
        for group in range(self.groups):
            for tensor, rows in zip(full, self._rows(), strict=True):
                start, stop = max(share.start - place, 0), min(share.stop - place, rows)
                if start < stop:
                    pieces.append(tensor[group * rows + start : group * rows + stop])
                place += rows
        return _join(pieces, 0)

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows = self._rows()
        by_group = _join(shards, 0).unflatten(0, (self.groups, sum(rows)))
        return tuple(part.flatten(0, 1) for part in by_group.split(rows, dim=1))

    def _rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in one group."""
        return (self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim)


@dataclass(frozen=True, slots=True)
class GateUp:
    """The two inputs of a gated MLP in one tensor: ``[gate; up]`` of the rank."""

    def split(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return _join([tensor[_part(tensor.shape[0], rank, size)] for tensor in full], 0)

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(_join([half[i] for half in halves], 0) for i in range(2))


@dataclass(frozen=True, slots=True)
class Vocab:
    """Vocabulary rows, with rows of zeros appended: see ``padded_vocab_size``."""

    vocab_size: int
    padded: bool = True
    """False in a file: nothing is appended when it is split. What others have appended is left out in any case."""

    def split(self, full: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        padded = padded_vocab_size(self.vocab_size, size) if self.padded else self.vocab_size
        rows = _part(padded, rank, size)
        part = full[0][rows.start : min(rows.stop, self.vocab_size)]
        missing = (rows.stop - rows.start) - part.shape[0]
        return _join([part, _zeros(part, missing)], 0) if missing else part

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_join(shards, 0)[: self.vocab_size],)


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The next multiple of 64, or of 64 x ranks where the ranks do not divide that.

    SGLang's rule. The trainer follows it, so that both can share an embedding.
    """
    padded = _round_up(vocab_size, 64)
    return padded if padded % tensor_parallel_size == 0 else _round_up(vocab_size, 64 * tensor_parallel_size)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _part(length: int, rank: int, size: int) -> slice:
    require(length % size == 0, f"{length} rows or columns cannot be divided over {size} tensor-parallel ranks")
    step = length // size
    return slice(rank * step, (rank + 1) * step)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=dim)
    import torch

    return torch.cat(list(parts), dim=dim)


def _zeros(like: Tensor, rows: int) -> Tensor:
    """So many rows of zeros to put below ``like``."""
    shape = (rows, *like.shape[1:])
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)
