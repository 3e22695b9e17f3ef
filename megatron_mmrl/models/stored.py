"""How a model lies in a Megatron distributed checkpoint: global tensors, their names, and what they are made of.

Nothing here knows a sharding rule from the inside: a rule's ``split`` on tensors without memory tells shapes, its
``merge`` on row numbers tells which row went where.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_mmrl.parallel.sharding import Rule, WeightEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A global tensor, or one layer of one: Megatron stacks equal layers along a new first dimension."""

    key: str
    """Name of the global tensor."""
    layer: int | None
    """Index along its first dimension; None: not stacked."""
    entry: WeightEntry
    """What it is made of; the part is the shard of a single tensor-parallel rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """Everything a converter has to know of a model."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor of the Hugging Face checkpoint, by original name."""
    num_layers: int
    parts: tuple[StoredPart, ...]
    """Together they hold each tensor of ``shapes`` once."""
    empty_objects: tuple[str, ...]
    """Keys of objects without content that Megatron's modules ask for (their FP8 state, of which there is none)."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensor that a checkpoint may hold although it equals another one -> that other one."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Megatron-LM's command line arguments that describe this model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive rows of a Hugging Face tensor that are consecutive in the stored tensor too."""

    first: int
    end: int
    stored_first: int


def stored_shape(part: StoredPart, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Of the part, without the dimension of the layers; ``shapes`` as in ``StoredModel``."""
    empty = [torch.empty(shapes[name], device="meta") for name in part.entry.hf_names]
    return tuple(part.entry.rule.split(empty, 0, 1).shape)


@functools.cache
def row_runs(rule: Rule, stored_rows: int) -> tuple[tuple[Run, ...], ...]:
    """For each Hugging Face tensor of a part: where its rows are among the part's ``stored_rows``."""
    return tuple(tuple(_runs(rows.tolist())) for rows in rule.merge([torch.arange(stored_rows)]))


def _runs(places: Sequence[int]) -> Iterator[Run]:
    begin = 0
    for row in range(1, len(places) + 1):
        if row == len(places) or places[row] != places[row - 1] + 1:
            yield Run(first=begin, end=row, stored_first=places[begin])
            begin = row
