"""What an engine rank is told to attach: for each of its parameters, where in the trainer's memory it is. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.geometry import Shape
from megatron_mmrl.reshard.places import Handle, Place, packed
from megatron_mmrl.reshard.plan import Move, Planner

FORMAT = 1
"""Of the JSON; both sides must mean the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """One parameter of the engine, exactly as it must be."""

    name: str
    shape: Shape
    stride: Shape  # elements
    dtype: str  # "float32", "bfloat16"
    block: int  # number in AttachSpec.blocks
    offset: int  # byte at which it begins there


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachSpec:
    """All parameters of one engine rank."""

    rank: int  # tensor-parallel, in the engine
    size: int  # tensor-parallel ranks of the engine
    answer_dir: str  # the rank writes its verdict there
    blocks: tuple[Handle, ...]
    parameters: tuple[ParameterSpec, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return _digest(asdict(self))

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps({"format": FORMAT, "digest": self.digest, "content": asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> AttachSpec:
        """Raises ValueError for what ``to_json`` of this format has not written; TypeError for other fields."""
        content = _content(text)
        parameters = tuple(
            ParameterSpec(**{**item, "shape": tuple(item["shape"]), "stride": tuple(item["stride"])})
            for item in content.pop("parameters")
        )
        return cls(**{**content, "blocks": tuple(content["blocks"])}, parameters=parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChecksumRequest:
    """Which parameters of the engine are to be summed."""

    answer_dir: str
    names: tuple[str, ...] | None = None  # None: all

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        return json.dumps({"format": FORMAT, "digest": _digest(asdict(self)), "content": asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ChecksumRequest:
        """Raises ValueError for what ``to_json`` of this format has not written; TypeError for other fields."""
        content = _content(text)
        names = content["names"]
        return cls(answer_dir=content["answer_dir"], names=None if names is None else tuple(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """The exportable memory of one trainer rank, as any rank may know it."""

    handles: tuple[Handle, ...]
    held: Mapping[int, Place]  # row of TrainerSide.held -> the rank's shard
    arena: Mapping[int, Place]  # row of EngineSide.table -> the parameter of the engine rank on this rank's device


def arena_layout(planner: Planner, rank: int, moves: Sequence[Move], item_bytes: int) -> tuple[dict[int, int], int]:
    """Memory for those parameters of engine rank ``rank`` that are not shared with the trainer's own.

    Args:
        moves: ``planner.incoming`` of the device on which it runs.
        item_bytes: bytes of one number.

    Returns:
        byte offset by row of the engine's table, and bytes in all (0 where everything is shared). What no move fills is
        padding and must stay zero, as a new block is.
    """
    shared = {move.fragment.entry for move in moves if move.kind == "alias"}
    placements = planner.fragments.placements(rank)
    entries = [entry for entry in range(len(placements)) if entry not in shared]
    offsets, nbytes = packed(placements[entry].size * item_bytes for entry in entries)
    return dict(zip(entries, offsets, strict=True)), nbytes


def attach_spec(
    planner: Planner, rank: int, moves: Sequence[Move], memory: RankMemory, *, dtype: str, answer_dir: str
) -> AttachSpec:
    """What engine rank ``rank`` is told.

    Args:
        moves: ``planner.incoming`` of the device on which it runs.
        memory: of that device's trainer rank.
        dtype: of every parameter, on both sides.
    """
    aliases = {move.fragment.entry: move.fragment.held for move in moves if move.kind == "alias"}
    parameters = []
    for number, placement in enumerate(planner.fragments.placements(rank)):
        block, offset = memory.held[aliases[number]] if number in aliases else memory.arena[number]
        parameters.append(
            ParameterSpec(
                name=planner.engine.table[number].name,
                shape=placement.shape,
                stride=contiguous_stride(placement.shape),
                dtype=dtype,
                block=block,
                offset=offset,
            )
        )
    return AttachSpec(
        rank=rank,
        size=planner.engine.tensor,
        answer_dir=answer_dir,
        blocks=memory.handles,
        parameters=tuple(parameters),
    )


def contiguous_stride(shape: Shape) -> Shape:
    """Elements between neighbours in each dimension, last dimension densest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(text: str) -> dict[str, Any]:
    """Raises ValueError."""
    message = json.loads(text)
    require(isinstance(message, dict) and message.keys() == {"format", "digest", "content"}, "not a message of ours")
    require(
        message["format"] == FORMAT,
        f"the message has format {message['format']}, this side reads {FORMAT}: trainer and engine differ in version",
    )
    require(_digest(message["content"]) == message["digest"], "the message does not have the digest it names")
    return message["content"]
