"""Do the shards of all ranks make up every tensor of the model, each number exactly once? Pure arithmetic on ranges.

A tensor is seen as a matrix: its first dimension, and all others as one. What a rank holds of it is a set of blocks of
that matrix, so gaps and overlaps are found by counting blocks over each cell between their borders.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["part", "replica", "copy"]
Range = tuple[int, int]  # first, end
_LAYER = re.compile(r"(.*\blayers)\.(\d+)\..*")
_BLOCK = re.compile(r"(.*\.\d+)\..*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of a checkpoint's tensor, seen as a matrix [shape[0], product of the rest]."""

    name: str
    rows: Range
    columns: Range

    @property
    def size(self) -> int:
        """How many numbers."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A parameter of one rank and what of the checkpoint is in it."""

    parameter: str
    shape: tuple[int, ...]
    """As Megatron built it."""
    pieces: tuple[Piece, ...]
    padding: int = 0
    """Numbers of it that the checkpoint has no value for (vocabulary rows that fill up the last ranks)."""
    role: Role = "part"
    """``replica``: each tensor-parallel rank holds all of it; ``copy``: another stage exports it (tied embeddings)."""
    trained: bool = True
    """False where frozen: it has no gradient and no optimizer state."""

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShards:
    """What the ranks at one place of the tensor and pipeline groups hold."""

    tensor: int
    pipeline: int
    chunks: tuple[tuple[Shard, ...], ...]
    """By virtual pipeline stage."""

    @property
    def shards(self) -> list[Shard]:
        """Of all chunks."""
        return [shard for chunk in self.chunks for shard in chunk]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The verdict: proved if there are no problems."""

    problems: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    """Of the checkpoint."""
    replicated: int
    """Numbers of it that every tensor-parallel rank of a stage holds."""
    copied: int
    """Numbers of it that a second stage holds again, all ranks together."""
    padding: int
    """Numbers that stand for nothing, all ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holder:
    """One piece in its place; ``stage`` counts in the order of the forward pass."""

    tensor: int
    stage: int
    role: Role
    piece: Piece


def check_coverage(shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[RankShards]) -> Coverage:
    """Compare what the ranks hold with what the checkpoint has.

    Found and named: a tensor nobody holds, one that does not exist, parts that are missing or held twice, parameters
    of another shape than their pieces, tensor-parallel ranks or pipeline stages in the wrong order.

    Args:
        shapes: of every tensor of the checkpoint, by its original name, in the order of the model.
        ranks: one for each pair of tensor and pipeline index.
    """
    tensor, pipeline = (1 + max(getattr(rank, axis) for rank in ranks) for axis in ("tensor", "pipeline"))
    holders: dict[str, list[_Holder]] = defaultdict(list)
    for rank in ranks:
        for virtual, shard in ((i, shard) for i, chunk in enumerate(rank.chunks) for shard in chunk):
            for piece in shard.pieces:
                stage = virtual * pipeline + rank.pipeline
                holders[piece.name].append(_Holder(tensor=rank.tensor, stage=stage, role=shard.role, piece=piece))
    problems = [
        *_absent_ranks(ranks, tensor, pipeline),
        *_wrong_shapes(ranks),
        *(f"{name} is held, but is no tensor of the checkpoint" for name in holders if name not in shapes),
        *_missing(shapes, holders),
    ]
    known = {name: holders[name] for name in shapes if name in holders}
    for name, held in known.items():
        problems += _tensor_problems(name, _matrix(shapes[name]), held, tensor)
    problems += _stages_out_of_order(known)
    held_whole = [name for name, held in known.items() if held[0].role == "replica"]
    shards = [shard for rank in ranks for shard in rank.shards]
    return Coverage(
        problems=tuple(problems),
        num_tensors=len(shapes),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        replicated=sum(math.prod(shapes[name]) for name in held_whole),
        copied=sum(piece.size for shard in shards if shard.role == "copy" for piece in shard.pieces),
        padding=sum(shard.padding for shard in shards),
    )


def _absent_ranks(ranks: Sequence[RankShards], tensor: int, pipeline: int) -> Iterator[str]:
    there = {(rank.tensor, rank.pipeline) for rank in ranks}
    for place in itertools.product(range(tensor), range(pipeline)):
        if place not in there:
            yield f"nothing is known of tensor rank {place[0]} in pipeline rank {place[1]}"


def _wrong_shapes(ranks: Sequence[RankShards]) -> Iterator[str]:
    for rank in ranks:
        for shard in rank.shards:
            held = shard.padding + sum(piece.size for piece in shard.pieces)
            if held != shard.size:
                yield (
                    f"{shard.parameter} of tensor rank {rank.tensor}, pipeline rank {rank.pipeline} has shape "
                    f"{list(shard.shape)}, that is {shard.size} numbers, but its pieces of "
                    f"{', '.join(sorted({piece.name for piece in shard.pieces}))} have {held}"
                )


def _missing(shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, list[_Holder]]) -> Iterator[str]:
    """Whole layers by the name of the layer, other tensors by their own."""
    blocks: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        match = _BLOCK.fullmatch(name)
        blocks[match[1] if match else name].append(name)
    for block, names in blocks.items():
        missing = [name for name in names if name not in held]
        if len(missing) == len(names) > 1:
            yield f"{block}: no rank holds any of its {len(names)} tensors"
        else:
            yield from (f"{name}: no rank holds it" for name in missing)


def _tensor_problems(name: str, size: tuple[int, int], holders: Sequence[_Holder], tensor: int) -> Iterator[str]:
    own, copies = ([h for h in holders if (h.role == "copy") is copy] for copy in (False, True))
    for group, what in ((own, ""), (copies, " (the second copy)")):
        roles, stages = sorted({h.role for h in group}), sorted({h.stage for h in group})
        if len(roles) > 1 or len(stages) > 1:
            yield f"{name}{what} is held by stages {stages} as {roles}: one stage and one way of holding is right"
        elif roles == ["replica"]:
            for rank in range(tensor):
                yield from _gaps_and_overlaps(f"{name} on tensor rank {rank}", size, _of(group, rank))
        elif group:
            yield from _gaps_and_overlaps(name + what, size, group)
            yield from _ranks_out_of_order(name + what, group, tensor)
    if copies and not own:
        yield f"{name} is held as a copy only: no rank exports it"


def _gaps_and_overlaps(name: str, size: tuple[int, int], holders: Sequence[_Holder]) -> Iterator[str]:
    pieces = [holder.piece for holder in holders]
    rows, columns = (
        sorted({0, length, *(border for piece in pieces for border in getattr(piece, axis))})
        for axis, length in zip(("rows", "columns"), size, strict=True)
    )
    for cell in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
        there = [h.tensor for h in holders if _inside(cell[0], h.piece.rows) and _inside(cell[1], h.piece.columns)]
        region = _region(cell, size)
        if any(part[1] > length for part, length in zip(cell, size, strict=True)):
            if there:
                yield f"{name}: tensor rank {there[0]} holds {region}, outside of its shape {list(size)}"
        elif not there:
            yield f"{name}: no rank holds {region}"
        elif len(there) > 1:
            yield f"{name}: tensor ranks {there} all hold {region}"


def _ranks_out_of_order(name: str, holders: Sequence[_Holder], tensor: int) -> Iterator[str]:
    """Shards are joined in the order of the ranks: a later rank must hold what comes later."""
    firsts = [
        (rank, min((h.piece.rows[0], h.piece.columns[0]) for h in held))
        for rank in range(tensor)
        if (held := _of(holders, rank))
    ]
    for (rank, first), (next_rank, next_first) in itertools.pairwise(firsts):
        if first > next_first:
            yield (
                f"{name}: tensor rank {rank} holds what comes after the part of tensor rank {next_rank} (from row "
                f"{first[0]}, column {first[1]}, against row {next_first[0]}, column {next_first[1]}): swapped ranks?"
            )


def _stages_out_of_order(holders: Mapping[str, Sequence[_Holder]]) -> Iterator[str]:
    """Layers ascend with the stages; what the model has before them is on the first stage, after them on the last."""
    stage_of_layer: dict[int, int] = {}
    for name, held in holders.items():
        if match := _LAYER.fullmatch(name):
            stage_of_layer.setdefault(int(match[2]), min(holder.stage for holder in held))
    for (layer, stage), (next_layer, next_stage) in itertools.pairwise(sorted(stage_of_layer.items())):
        if stage > next_stage:
            yield f"layer {layer} is on stage {stage}, after layer {next_layer} on stage {next_stage}: swapped stages?"
    if not stage_of_layer:
        return
    names = list(holders)
    layers = [index for index, name in enumerate(names) if _LAYER.fullmatch(name)]
    last = max(holder.stage for held in holders.values() for holder in held)
    for ends, right in ((names[: layers[0]], 0), (names[layers[-1] + 1 :], last)):
        for name in ends:
            stages = {holder.stage for holder in holders[name] if holder.role != "copy"}
            if len(stages) == 1 and stages != {right}:
                yield f"{name} is on stage {stages.pop()}, but belongs to stage {right} of 0-{last}: swapped stages?"


def _of(holders: Iterable[_Holder], tensor: int) -> list[_Holder]:
    return [holder for holder in holders if holder.tensor == tensor]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _inside(part: Range, whole: Range) -> bool:
    return whole[0] <= part[0] and part[1] <= whole[1]


def _region(cell: tuple[Range, Range], size: tuple[int, int]) -> str:
    parts = [
        f"{axis} {first}-{end - 1}"
        for axis, (first, end), length in zip(("rows", "columns"), cell, size, strict=True)
        if (first, end) != (0, length)
    ]
    return " of ".join(reversed(parts)) or "all of it"
