"""Bytes that a weight hand-over moves between ranks, against the fewest possible, for the published models.

An exact count over pairs of layouts, no timing: for every engine the minimum is found apart from the planner, from the
blocks that each rank holds and needs. Beside it stands what gathering full tensors on every rank would move.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from megatron_mmrl.models.qwen2_5_vl.config import TextSizes
from megatron_mmrl.models.qwen2_5_vl.engine_weights import engine_table
from megatron_mmrl.models.qwen2_5_vl.stored import hf_shapes
from megatron_mmrl.models.qwen2_5_vl.weights import stage_table
from megatron_mmrl.parallel.geometry import Piece, shard_placement
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.fragments import EngineSide, Held, TrainerSide
from megatron_mmrl.reshard.plan import Planner

CONFIGS = Path(__file__).parents[1] / "configs" / "models"
MODELS = ("3b", "7b", "32b", "72b")
NODE = 8  # ranks
ELEMENT_BYTES = 2  # bfloat16
Blocks = dict[str, list[Piece]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One pair of layouts and what moves."""

    model: str
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data: int
    engine_tensor: int
    engines: int
    wire_bytes: int
    least_bytes: int
    gather_bytes: int


class Model:
    """A published model: its sizes, and the tables of both sides."""

    def __init__(self, name: str) -> None:
        config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"qwen2_5_vl_{name}.yaml"))
        self.config = cast("dict[str, Any]", config)
        self.text = self.config["text_config"]
        self.shapes = _shapes(self.config)
        self.sizes = TextSizes(
            heads=self.text["num_attention_heads"],
            groups=self.text["num_key_value_heads"],
            head_dim=self.text["hidden_size"] // self.text["num_attention_heads"],
            vocab_size=self.text["vocab_size"],
            tied=self.config["tie_word_embeddings"],
        )

    def planner(self, layout: ParallelLayout, engine_tensor: int, engines: int) -> Planner:
        """The plan between two layouts."""
        vision = [name for name in self.shapes if name.startswith("visual.")]
        rows = stage_table(self.sizes, self.text["num_hidden_layers"], vision, layout)
        held = tuple(Held(stage=stage, chunk=chunk, entry=entry) for stage, chunk, entry in rows)
        table = tuple(engine_table(self.config))
        return Planner(
            TrainerSide(layout=layout, held=held),
            EngineSide(table=table, tensor=engine_tensor, engines=engines),
            self.shapes,
        )

    def layouts(self) -> Iterator[tuple[ParallelLayout, int, int]]:
        """Trainer layout, ranks of an engine, number of engines."""
        heads, groups, layers = self.sizes.heads, self.sizes.groups, self.text["num_hidden_layers"]

        def fits(size: int) -> bool:
            return heads % size == 0 and (groups % size == 0 or size % groups == 0) and 16 % size == 0

        tensors = [size for size in (1, 2, 4, 8) if fits(size)]
        stages = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2))
        for tensor, (pipeline, chunks), engine in itertools.product(tensors, stages, tensors):
            if layers % (pipeline * chunks):
                continue
            for context, data in ((1, 1), (2, 1), (1, 2)):
                layout = ParallelLayout(
                    tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, context=context, data=data
                )
                if engine <= layout.world_size <= 64:
                    yield layout, engine, layout.world_size // engine


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen2_5_VLConfig

    return hf_shapes(Qwen2_5_VLConfig(**config))


def least_elements(planner: Planner, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The fewest elements that have to cross, over all ways to place each engine's ranks."""
    layout, engine = planner.trainer.layout, planner.engine
    needed = [_needed(planner, rank) for rank in range(engine.tensor)]
    held = {
        (at.tensor, at.pipeline): _held(planner, shapes, at.tensor, at.pipeline)
        for at in map(layout.coordinates, range(layout.world_size))
    }
    missing = {
        (rank, place): _area(blocks) - _overlap(blocks, have)
        for rank, blocks in enumerate(needed)
        for place, have in held.items()
    }
    share, total = layout.world_size // engine.engines, 0
    node = min(layout.world_size, NODE)
    size = node if node % share == 0 and layout.world_size % node == 0 else share  # devices that engines choose among
    for first in range(0, layout.world_size, size):
        places = [layout.coordinates(device) for device in range(first, first + size)]
        costs = [[missing[rank, (at.tensor, at.pipeline)] for at in places] for rank in range(engine.tensor)]
        total += least_sum(np.repeat(costs, size // share, axis=0))
    return total


def _needed(planner: Planner, rank: int) -> Blocks:
    blocks: Blocks = {}
    for entry, placement in zip(planner.engine.table, planner.fragments.placements(rank), strict=True):
        for piece in placement.pieces:
            blocks.setdefault(entry.hf_names[piece.tensor], []).append(piece)
    return blocks


def _held(planner: Planner, shapes: Mapping[str, tuple[int, ...]], tensor: int, stage: int) -> Blocks:
    blocks: Blocks = {}
    for held in planner.trainer.held:
        if held.stage == stage:
            full = tuple(shapes[name] for name in held.entry.hf_names)
            for piece in shard_placement(held.entry.rule, full, tensor, planner.trainer.layout.tensor).pieces:
                blocks.setdefault(held.entry.hf_names[piece.tensor], []).append(piece)
    return blocks


def _area(blocks: Blocks) -> int:
    return sum(piece.of.size for pieces in blocks.values() for piece in pieces)


def _overlap(one: Blocks, other: Blocks) -> int:
    """Elements in both; the blocks of each do not overlap among themselves (a tied copy is the same block again)."""
    total = 0
    for name, pieces in one.items():
        have = {piece.of for piece in other.get(name, ())}
        for piece in pieces:
            for rect in have:
                rows = min(piece.of.bottom, rect.bottom) - max(piece.of.top, rect.top)
                columns = min(piece.of.right, rect.right) - max(piece.of.left, rect.left)
                total += max(0, rows) * max(0, columns)
    return total


def least_sum(costs: np.ndarray) -> int:
    """Each row takes a column of its own; by dynamic programming over the sets of rows served."""
    return _least_sum(tuple(map(tuple, costs.tolist())))


@functools.lru_cache(maxsize=4096)  # nodes are alike
def _least_sum(costs: tuple[tuple[int, ...], ...]) -> int:
    best = {0: 0}
    for column in range(len(costs[0])):
        grown = dict(best)
        for taken, cost in best.items():
            for row, of_row in enumerate(costs):
                if not taken >> row & 1:
                    key = taken | 1 << row
                    grown[key] = min(grown.get(key, sys.maxsize), cost + of_row[column])
        best = grown
    return best[(1 << len(costs)) - 1]


def count(name: str) -> list[Pair]:
    """All pairs of one model."""
    model, pairs = Model(name), []
    parameters = sum(map(math.prod, model.shapes.values()))
    for layout, engine, engines in model.layouts():
        planner = model.planner(layout, engine, engines)
        held = parameters / (layout.tensor * layout.pipeline)
        pairs.append(
            Pair(
                model=name,
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                virtual_pipeline=layout.virtual_pipeline,
                context=layout.context,
                data=layout.data,
                engine_tensor=engine,
                engines=engines,
                wire_bytes=planner.wire_elements() * ELEMENT_BYTES,
                least_bytes=least_elements(planner, model.shapes) * ELEMENT_BYTES,
                gather_bytes=round((parameters - held) * engine * engines) * ELEMENT_BYTES,
            )
        )
    return pairs


def time_planning(rank: int = 300) -> dict[str, float]:
    """72B on 512 ranks: seconds for one rank's plan, and its size."""
    model = Model("72b")
    layout = ParallelLayout(tensor=8, pipeline=8, data=8)
    start = time.perf_counter()
    planner = model.planner(layout, 8, 64)
    plan = planner.incoming(rank), planner.outgoing(rank)
    seconds = time.perf_counter() - start
    return {"plan_s": seconds, "plan_mb": len(pickle.dumps(plan)) / 1e6, "moves": sum(map(len, plan))}


def print_table(pairs: Sequence[Pair]) -> None:
    """One line per model."""
    print(
        f"{'model':>5} {'pairs':>6} {'bytes / least':>14} {'zero bytes':>11} {'full gather / ours (median, most)':>34}"
    )
    for name in dict.fromkeys(pair.model for pair in pairs):
        own = [pair for pair in pairs if pair.model == name]
        worst = max(_ratio(pair.wire_bytes, pair.least_bytes) for pair in own)
        gather = [pair.gather_bytes / pair.wire_bytes for pair in own if pair.wire_bytes and pair.gather_bytes]
        zero = sum(pair.wire_bytes == 0 for pair in own)
        print(f"{name:>5} {len(own):>6} {worst:>14.3f} {zero:>11} {np.median(gather):>25.1f}, {max(gather):.1f}")


def _ratio(ours: int, least: int) -> float:
    return ours / least if least else (1.0 if ours == 0 else math.inf)
