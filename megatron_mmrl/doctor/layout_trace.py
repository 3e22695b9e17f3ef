"""Which blocks of a checkpoint's tensors a sharding rule puts into a shard, found by running the rule itself.

A rule reads full tensors through ``shape`` and slices only, so something small can stand for a tensor of any size: rows
that are their own numbers, and columns that are only noted when they are read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.doctor.coverage import Piece, Range, Role
from megatron_mmrl.parallel.sharding import Replicated, Rule, WeightEntry


def trace(
    entry: WeightEntry, shapes: Mapping[str, tuple[int, ...]], rank: int, size: int
) -> tuple[Role, tuple[Piece, ...], int]:
    """What ``entry`` puts into a parameter of tensor-parallel rank ``rank`` of ``size``.

    The order of rows within the shard is not looked at.

    Args:
        shapes: of every tensor of the checkpoint, by its original name.

    Returns:
        how it is held, the blocks, and how many numbers of the shard are padding.

    Raises:
        ValueError: the entry names a tensor that does not exist, or cuts it in a way that cannot be traced.
    """
    unknown = [name for name in entry.hf_names if name not in shapes]
    require(not unknown, f"the weight table wants {unknown}, which the Hugging Face model does not have")
    cut = _cut(cast("Hashable", entry.rule), tuple(shapes[name] for name in entry.hf_names), rank, size)
    role: Role = "replica" if isinstance(entry.rule, Replicated) else "part" if entry.exported else "copy"
    pieces = (Piece(name=entry.hf_names[i], rows=rows, columns=cut.columns) for i, rows in cut.rows)
    return role, tuple(pieces), cut.padding_rows * (cut.columns[1] - cut.columns[0])


class NumberedRows:
    """Stands for a full tensor: row r reads as ``first + r``, whatever its columns.

    Args:
        shape: of the full tensor.
        first: number of its first row.
    """

    def __init__(self, shape: tuple[int, ...], first: int) -> None:
        self.shape = shape
        self.columns_read: set[Range] = set()
        self._rows = torch.arange(first, first + shape[0]).view(-1, *(1 for _ in shape[1:]))

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Tensor:
        rows, *others = key if isinstance(key, tuple) else (key,)
        columns = others[0] if others else slice(None)
        first, end, step = columns.indices(math.prod(self.shape[1:]))
        require(
            step == 1 and (not others or len(others) == 1 == len(self.shape) - 1),
            f"slice {key} of a tensor of shape {list(self.shape)}: only rows, or columns of a matrix, can be traced",
        )
        self.columns_read.add((first, end))
        return self._rows[rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    rows: tuple[tuple[int, Range], ...]
    """(index among the entry's tensors, range of its rows)."""
    columns: Range
    padding_rows: int


@functools.lru_cache(maxsize=4096)  # the same for every layer
def _cut(rule: Rule, shapes: tuple[tuple[int, ...], ...], rank: int, size: int) -> _Cut:
    firsts = [1]  # 0 is padding; a number is left out between tensors, so that no range runs over a border
    for shape in shapes[:-1]:
        firsts.append(firsts[-1] + shape[0] + 1)
    full = [NumberedRows(shape, first) for shape, first in zip(shapes, firsts, strict=True)]
    numbers = rule.split(full, rank, size).flatten().sort().values
    columns = set().union(*(tensor.columns_read for tensor in full))
    require(len(columns) == 1, f"{rule} takes columns {sorted(columns)} into one shard; only one range can be traced")
    held = numbers[numbers > 0]
    rows = []
    for numbers_of_range in held.tensor_split((held.diff() != 1).nonzero().flatten() + 1) if len(held) else ():
        first = int(numbers_of_range[0])
        tensor = max(i for i in range(len(shapes)) if firsts[i] <= first)
        rows.append((tensor, (first - firsts[tensor], first - firsts[tensor] + len(numbers_of_range))))
    return _Cut(rows=tuple(rows), columns=columns.pop(), padding_rows=len(numbers) - len(held))
