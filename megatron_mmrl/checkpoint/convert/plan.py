"""Which global tensors a Megatron checkpoint gets from a Hugging Face one, and in what chunks. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_mmrl.config.checks import require
from megatron_mmrl.models.stored import StoredModel, StoredPart, stored_shape
from megatron_mmrl.parallel.sharding import GateUp, Replicated, Row, Rule

CHUNKS = 8
"""A matrix is stored in so many chunks along the dimension that tensor parallelism divides: Megatron reads whole chunks,
so up to this many ranks read no more than their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One layer of a global tensor, or an unstacked tensor: what is made and written at a time."""

    stored: StoredPart
    shape: tuple[int, ...]
    """Without the dimension of the layers."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Shape of what stands before its own in a chunk: the dimension of the layers, if they are stacked."""
        return () if self.stored.layer is None else (1,)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalTensor:
    """One named tensor of the Megatron checkpoint."""

    key: str
    dtype: torch.dtype
    """The smallest that holds every tensor it is made of exactly."""
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return math.prod(self.shape) * self.dtype.itemsize


def global_tensors(model: StoredModel, dtypes: Mapping[str, torch.dtype]) -> tuple[GlobalTensor, ...]:
    """All of them, in the order of the table.

    Args:
        dtypes: of every Hugging Face tensor, by original name.
    """
    by_key: dict[str, list[StoredPart]] = {}
    for part in model.parts:
        by_key.setdefault(part.key, []).append(part)
    tensors = []
    for key, stored in by_key.items():
        parts = tuple(Part(stored=part, shape=stored_shape(part, model.shapes)) for part in stored)
        names = [name for part in stored for name in part.entry.hf_names]
        lead = () if stored[0].layer is None else (model.num_layers,)
        dtype = functools.reduce(torch.promote_types, (dtypes[name] for name in names))
        tensors.append(GlobalTensor(key=key, dtype=dtype, shape=(*lead, *parts[0].shape), parts=parts))
    return tuple(tensors)


def divided_dim(rule: Rule) -> int | None:
    """The dimension that tensor parallelism divides; None: each rank has all of it."""
    if isinstance(rule, Replicated):
        return None
    return 1 if isinstance(rule, Row) else 0


def chunk_slices(rule: Rule, shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The chunks in which a part of this shape is stored; together they are all of it."""
    whole = tuple(slice(0, size) for size in shape)
    dim = divided_dim(rule)
    if dim is None or len(shape) == 1:  # a bias is not worth it
        yield whole
        return
    count = 2 * CHUNKS if isinstance(rule, GateUp) else CHUNKS  # a rank has a share of gate and one of up
    step = -(-shape[dim] // count)
    for first in range(0, shape[dim], step):
        yield (*whole[:dim], slice(first, min(first + step, shape[dim])), *whole[dim + 1 :])


def check_names(found: Iterable[str], model: StoredModel, source: str) -> None:
    """Refuse a checkpoint that lacks tensors of the model or has others. Raises ValueError."""
    found = set(found)
    missing = [name for name in model.shapes if name not in found]
    require(not missing, f"{source} lacks {_listed(missing)}, which its config.json asks for")
    extra = sorted(found - model.shapes.keys() - model.copies.keys())
    require(not extra, f"{source} has {_listed(extra)}, which its config.json does not ask for")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:3])}{more}"
