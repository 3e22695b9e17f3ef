"""What every rank of a layout would hold of a model, and the proof that together they hold all of it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.doctor.coverage import Coverage, RankShards, Shard, check_coverage
from megatron_mmrl.doctor.layout_memory import rank_bytes
from megatron_mmrl.doctor.layout_model import hf_shapes
from megatron_mmrl.doctor.layout_shards import build_rank
from megatron_mmrl.memory.parameters import ParameterBytes
from megatron_mmrl.parallel.layout import ParallelLayout

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PARTS = {
    "visual.": "vision tower",
    "model.embed_tokens.": "embedding",
    "model.norm.": "final norm",
    "lm_head.": "output layer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankKind:
    """Ranks that hold the same shards: they differ in their data or context index alone."""

    tensor: int
    pipeline: int
    ranks: tuple[int, ...]
    num_parameters: int
    num_trained: int
    bytes: ParameterBytes
    layers: tuple[tuple[int, ...], ...]
    """Numbers of the decoder layers, by virtual pipeline stage."""
    parts: tuple[str, ...]
    """What it holds besides layers."""
    seconds: float
    """That building it took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutReport:
    """What ``mmrl doctor layout`` has to say."""

    layout: ParallelLayout
    num_tensors: int
    num_parameters: int
    """Of the Hugging Face model; tied embeddings count once."""
    kinds: tuple[RankKind, ...]
    coverage: Coverage | None
    """None when not all kinds of rank were built."""


def inspect_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    ranks: Sequence[int] | None = None,
    on_built: Callable[[int, int], None] = lambda _built, _of: None,
) -> LayoutReport:
    """Build the shards of each kind of rank on meta tensors, one kind after the other, and add them up.

    Args:
        model: its path is a directory with a ``config.json``; no weights are read.
        ranks: those to look at; None: all, with the proof of coverage.
        on_built: told how many kinds are built, and of how many.

    Raises:
        ValueError: a rank outside of the world, or a model that cannot be cut so.
    """
    layout = ParallelLayout.from_config(parallel)
    members = _kinds(layout, range(layout.world_size) if ranks is None else ranks)
    shapes = hf_shapes(Path(model.path))
    shards, kinds = [], []
    for same in members:
        start = time.perf_counter()
        shards.append(build_rank(model, parallel, same[0], shapes))
        kinds.append(_describe(shards[-1], same, model, layout, time.perf_counter() - start))
        on_built(len(kinds), len(members))
    return LayoutReport(
        layout=layout,
        num_tensors=len(shapes),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        kinds=tuple(kinds),
        coverage=check_coverage(shapes, shards) if len(members) == layout.tensor * layout.pipeline else None,
    )


def _kinds(layout: ParallelLayout, ranks: Iterable[int]) -> list[list[int]]:
    """The ranks, those together that have the same tensor and pipeline index."""
    members: dict[tuple[int, int], list[int]] = {}
    for rank in sorted(set(ranks)):
        at = layout.coordinates(rank)
        members.setdefault((at.pipeline, at.tensor), []).append(rank)
    return list(members.values())


def _describe(
    held: RankShards, ranks: Sequence[int], model: ModelConfig, layout: ParallelLayout, seconds: float
) -> RankKind:
    parameters = sum(shard.size for shard in held.shards)
    trained = sum(shard.size for shard in held.shards if shard.trained)
    names = [[piece.name for shard in chunk for piece in shard.pieces] for chunk in held.chunks]
    layers = [{int(match[1]) for name in chunk if (match := _LAYER.match(name))} for chunk in names]
    return RankKind(
        tensor=held.tensor,
        pipeline=held.pipeline,
        ranks=tuple(ranks),
        num_parameters=parameters,
        num_trained=trained,
        bytes=rank_bytes(parameters, trained, model.dtype, layout.data * layout.context),
        layers=tuple(tuple(sorted(chunk)) for chunk in layers),
        parts=tuple(dict.fromkeys(part for shard in held.shards for part in _parts(shard))),
        seconds=seconds,
    )


def _parts(shard: Shard) -> list[str]:
    parts = [part for start, part in _PARTS.items() if any(piece.name.startswith(start) for piece in shard.pieces)]
    return [f"copy of the {part}" if shard.role == "copy" else part for part in parts]
