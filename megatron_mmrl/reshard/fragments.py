"""What an engine rank's parameters have in common with the trainer's shards, rectangle by rectangle. Pure.

A *fragment* is the intersection of one rectangle of an engine's parameter with one of a trainer's. Two engine ranks in
the same place of their groups have the same fragments, and a layer has those of the layer before it, so the work does
not grow with the number of nodes and hardly with that of layers.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.engine_sharding import EngineEntry
from megatron_mmrl.parallel.geometry import Piece, Placement, Rect, Shape, shard_placement
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.sharding import Replicated, Rule, WeightEntry

ANY = -1
"""Tensor-parallel rank of what all of them hold alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A parameter of the trainer: which pipeline stage and model chunk hold it, and what it is made of."""

    stage: int
    chunk: int
    entry: WeightEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSide:
    """All parameters of the trainer. A tensor that two stages hold (a tied output layer) is in two rows of ``held``."""

    layout: ParallelLayout
    held: tuple[Held, ...]
    ranks_per_node: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSide:
    """All parameters of the engines. The first of the e-th of equal, contiguous shares of the trainer ranks leads
    engine e."""

    table: tuple[EngineEntry, ...]
    tensor: int
    """Ranks of one engine."""
    engines: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """A rectangle that both sides hold."""

    entry: int  # which parameter of the engine
    held: int  # which parameter of the trainer
    tensor: int  # trainer's tensor-parallel rank, or ANY
    source: Rect  # in the trainer's shard
    target: Rect  # in the engine's parameter


class Fragments:
    """All fragments of a pair of layouts, found when asked for.

    Args:
        shapes: of every full tensor, by Hugging Face name.

    Raises:
        ValueError: the engine needs a tensor that no trainer rank holds.
    """

    def __init__(self, trainer: TrainerSide, engine: EngineSide, shapes: Mapping[str, Shape]) -> None:
        self._trainer, self._engine, self.shapes = trainer, engine, shapes
        self._owners: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, held in enumerate(trainer.held):
            for position, name in enumerate(held.entry.hf_names):
                self._owners[name].append((number, position))
        for entry in engine.table:
            for name in entry.hf_names:
                require(name in self._owners, f"the engine's {entry.name} needs {name}, which no trainer rank holds")
        twice = (owners for owners in self._owners.values() if len(owners) > 1)
        self._choosing_stages = frozenset(trainer.held[number].stage for owners in twice for number, _ in owners)
        self.placements = functools.cache(self._place)
        self._found, self._counted = functools.cache(self._find), functools.cache(self._count)

    def of(self, rank: int, stage: int) -> tuple[Fragment, ...]:
        """Those of engine rank ``rank`` on a device whose trainer rank is in pipeline stage ``stage``."""
        return self._found(rank, self._point_of_view(stage))

    def sizes(self, rank: int, stage: int) -> Mapping[tuple[int, int], int]:
        """Elements of engine rank ``rank`` by where they come from: (stage, tensor-parallel rank or ANY)."""
        return self._counted(rank, self._point_of_view(stage))

    def shard(self, fragment: Fragment) -> Placement:
        """The trainer's shard that a fragment is taken from."""
        held = self._trainer.held[fragment.held]
        return shard_placement(held.entry.rule, self._full(held), max(0, fragment.tensor), self._trainer.layout.tensor)

    def _point_of_view(self, stage: int) -> int:
        """Where a tensor is held twice, the own stage's copy is taken; otherwise all stages see the same."""
        return stage if stage in self._choosing_stages else 0

    def _place(self, rank: int) -> tuple[Placement, ...]:
        """Shape and content of every parameter of engine rank ``rank``."""
        return tuple(
            entry.rule.place(
                [self.shapes[name] for name in entry.hf_names],
                *((rank, self._engine.tensor) if entry.divided else (0, 1)),
            )
            for entry in self._engine.table
        )

    def _find(self, rank: int, stage: int) -> tuple[Fragment, ...]:
        return tuple(
            fragment
            for number, (entry, placement) in enumerate(zip(self._engine.table, self.placements(rank), strict=True))
            for piece in placement.pieces
            for fragment in self._of_piece(number, entry.hf_names[piece.tensor], piece, stage)
        )

    def _of_piece(self, entry: int, name: str, piece: Piece, stage: int) -> Iterator[Fragment]:
        owners = self._owners[name]
        number, position = next((own for own in owners if self._trainer.held[own[0]].stage == stage), owners[0])
        held = self._trainer.held[number]
        shared = _shared(piece, held.entry.rule, self._full(held), position, self._trainer.layout.tensor)
        return (Fragment(entry, number, tensor, source, target) for tensor, source, target in shared)

    def _count(self, rank: int, stage: int) -> Mapping[tuple[int, int], int]:
        total: dict[tuple[int, int], int] = defaultdict(int)
        for fragment in self._found(rank, stage):
            total[self._trainer.held[fragment.held].stage, fragment.tensor] += fragment.source.size
        return total

    def _full(self, held: Held) -> tuple[Shape, ...]:
        return tuple(self.shapes[name] for name in held.entry.hf_names)


@functools.lru_cache(maxsize=65536)  # the same for every layer
def _shared(
    piece: Piece, rule: Rule, shapes: tuple[Shape, ...], position: int, size: int
) -> tuple[tuple[int, Rect, Rect], ...]:
    """What the shards of ``rule`` hold of ``piece``, a part of full tensor ``position``.

    Returns:
        (tensor-parallel rank or ANY, rectangle of its shard, rectangle of the engine's parameter)
    """
    alike = isinstance(rule, Replicated)
    found = []
    for rank in range(1 if alike else size):
        for held in shard_placement(rule, shapes, rank, size).pieces:
            common = piece.of & held.of if held.tensor == position else None
            if common is not None:
                found.append((ANY if alike else rank, held.local(common), piece.local(common)))
    return tuple(found)
