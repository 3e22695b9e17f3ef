"""How SGLang cuts and pads each kind of weight over its tensor-parallel ranks. Pure.

A rule says which rectangles of the full tensors an engine's parameter is made of; what no rectangle covers is padding
and must be zero (the engine's kernels read it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.geometry import Piece, Placement, Rect, Shape, as_matrix
from megatron_mmrl.parallel.sharding import padded_vocab_size


class EngineRule(Protocol):
    """One way in which SGLang holds full tensors."""

    def place(self, shapes: Sequence[Shape], rank: int, size: int) -> Placement:
        """The parameter of engine rank ``rank`` of ``size``. Raises ValueError for what SGLang cannot divide."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    """A row of a model's table of engine parameters: what one of them is made of."""

    name: str
    hf_names: tuple[str, ...]
    rule: EngineRule
    divided: bool = True
    """False where every engine rank holds it as a single rank would, whatever their number."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Every engine rank holds all of it."""

    def place(self, shapes: Sequence[Shape], rank: int, size: int) -> Placement:
        rows, columns = as_matrix(shapes[0])
        return Placement(shape=shapes[0], pieces=(_placed(0, Rect(0, rows, 0, columns), 0),))


@dataclass(frozen=True, slots=True)
class Rows:
    """Tensors of equal size, the rows of each divided (SGLang's column-parallel layers): the ranks' parts in order.

    ``multiple_of``: the rows of each are first padded to a multiple of it.
    """

    multiple_of: int = 1

    def place(self, shapes: Sequence[Shape], rank: int, size: int) -> Placement:
        length, columns = as_matrix(shapes[0])
        share = _share(_round_up(length, self.multiple_of), size)
        pieces = [
            _placed(number, Rect(rank * share, min(length, (rank + 1) * share), 0, columns), number * share)
            for number in range(len(shapes))
            if rank * share < length
        ]
        return Placement(shape=(len(shapes) * share, *shapes[0][1:]), pieces=tuple(pieces))


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns are divided (SGLang's row-parallel layers), after padding to a multiple of ``multiple_of``."""

    multiple_of: int = 1

    def place(self, shapes: Sequence[Shape], rank: int, size: int) -> Placement:
        rows, length = as_matrix(shapes[0])
        share = _share(_round_up(length, self.multiple_of), size)
        left, right = rank * share, min(length, (rank + 1) * share)
        pieces = (_placed(0, Rect(0, rows, left, right), 0),) if left < right else ()
        return Placement(shape=(rows, share), pieces=pieces)


@dataclass(frozen=True, slots=True)
class Heads:
    """``[Q; K; V]`` of the rank's heads. With fewer key/value heads than ranks, each is held by several ranks.

    Made of three tensors (q, k, v) or of one that holds them below each other.
    """

    heads: int
    groups: int
    head_dim: int

    def place(self, shapes: Sequence[Shape], rank: int, size: int) -> Placement:
        columns = as_matrix(shapes[0])[1]
        queries, keys = _share(self.heads, size), max(1, self.groups // size)
        require(
            self.groups % size == 0 or size % self.groups == 0,
            f"{self.groups} key/value heads cannot be divided over, or repeated on, {size} engine ranks",
        )
        first_key = rank * keys if self.groups >= size else rank // (size // self.groups)
        wanted = ((rank * queries, queries), (first_key, keys), (first_key, keys))
        pieces = tuple(self._pieces(wanted, columns, fused=len(shapes) == 1))
        return Placement(shape=((queries + 2 * keys) * self.head_dim, *shapes[0][1:]), pieces=pieces)

    def _pieces(self, wanted: Sequence[tuple[int, int]], columns: int, *, fused: bool) -> Iterator[Piece]:
        offsets = (0, self.heads, self.heads + self.groups) if fused else (0, 0, 0)
        row = 0
        for part, (first, count) in enumerate(wanted):
            top = (offsets[part] + first) * self.head_dim
            height = count * self.head_dim
            yield _placed(0 if fused else part, Rect(top, top + height, 0, columns), row)
            row += height


@dataclass(frozen=True, slots=True)
class VocabRows:
    """Rows of the vocabulary, padded as in the trainer: see ``padded_vocab_size``."""

    def place(self, shapes: Sequence[Shape], rank: int, size: int) -> Placement:
        return Rows(multiple_of=padded_vocab_size(shapes[0][0], size)).place(shapes, rank, size)


def _placed(number: int, of: Rect, row: int) -> Piece:
    """``of`` stands at local row ``row``, from the first column on."""
    return Piece(number, of, of.moved(row - of.top, -of.left))


def _share(length: int, size: int) -> int:
    require(length % size == 0, f"{length} rows, columns or heads cannot be divided over {size} engine ranks")
    return length // size


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
