"""Where the numbers of a shard come from: rectangles of full tensors, placed in a local one. Pure.

Full tensors are Hugging Face's, seen as matrices: [n] as [n, 1], and more than two dimensions as [first, the rest].
Every sharding rule, Megatron's or an engine's, is then a set of placed rectangles, and what two sides have in common is
an intersection of rectangles.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.sharding import Rule

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rect:
    """Rows [top, bottom) and columns [left, right) of a matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return (self.bottom - self.top) * (self.right - self.left)

    def __and__(self, other: Rect) -> Rect | None:
        """What both cover, or None."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rect(top, bottom, left, right) if top < bottom and left < right else None

    def moved(self, down: int, across: int) -> Rect:
        """The same size elsewhere."""
        return Rect(self.top + down, self.bottom + down, self.left + across, self.right + across)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rectangle ``of`` full tensor number ``tensor`` stands at ``at`` in the local matrix."""

    tensor: int
    of: Rect
    at: Rect

    def local(self, part: Rect) -> Rect:
        """Where ``part``, a rectangle inside ``of``, stands in the local matrix."""
        return part.moved(self.at.top - self.of.top, self.at.left - self.of.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A local parameter: its shape, and what stands where in it. What no piece covers is padding, and zero."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of elements, padding included."""
        return math.prod(self.shape)


def as_matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor of this shape."""
    return shape[0], math.prod(shape[1:])


@functools.lru_cache(maxsize=4096)  # the same for every layer
def shard_placement(rule: Rule, shapes: tuple[Shape, ...], rank: int, size: int) -> Placement:
    """What ``rule.split`` makes for tensor-parallel rank ``rank`` of ``size``.

    The rule itself is run, on stand-ins that say where their rows come from: a layout is described once.

    Args:
        shapes: of the rule's full tensors, in order.

    Raises:
        ValueError: the rule slices in a way that cannot be traced.
    """
    traced = rule.split([_Traced(number, shape) for number, shape in enumerate(shapes)], rank, size)
    step = np.diff(traced, axis=0)
    goes_on = (step[:, 1] == 1) & (step[:, [0, 2, 3]] == 0).all(axis=1)
    firsts = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(traced)]
    pieces = []
    for first, end in itertools.pairwise(firsts):
        number, row, left, right = traced[first].tolist()
        if number:  # 0: rows of zeros
            of = Rect(row, row + end - first, left, right)
            pieces.append(Piece(number - 1, of, of.moved(first - row, -left)))
    width = pieces[0].at.right if pieces else as_matrix(shapes[0])[1]
    others = shapes[0][1:] if width == as_matrix(shapes[0])[1] else (width,)
    return Placement(shape=(len(traced), *others), pieces=tuple(pieces))


class _Traced:
    """Stands for full tensor ``number``: slicing it gives, for each row, (number + 1, row, left, right)."""

    def __init__(self, number: int, shape: Shape) -> None:
        self._number, self._matrix = number, as_matrix(shape)
        self.shape = shape

    def __getitem__(self, key: slice | tuple[slice, ...]) -> NDArray[np.int64]:
        down, across, *deeper = key if isinstance(key, tuple) else (key, slice(None))
        left, right, step = across.indices(self._matrix[1])
        require(
            step == 1 and not deeper and (len(self.shape) == 2 or across == slice(None)),
            f"slice {key} of a tensor of shape {list(self.shape)}: only rows, or columns of a matrix, can be traced",
        )
        rows = np.arange(self._matrix[0])[down]
        columns = [np.full_like(rows, n) if n is not None else rows for n in (self._number + 1, None, left, right)]
        return np.stack(columns, axis=1)
