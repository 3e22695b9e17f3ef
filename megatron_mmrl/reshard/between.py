"""The plan from a trainer to its engines, from sizes alone: no model is built, and no torch loaded."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_mmrl.config import Config
from megatron_mmrl.config.checks import require
from megatron_mmrl.models.registry import engine_parameters, held_parameters, tensor_shapes
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.fragments import EngineSide, Held, TrainerSide
from megatron_mmrl.reshard.plan import Planner


def planner_of(config: Config, ranks_per_node: int | None = None) -> Planner:
    """The plan of a run, the same on every rank; no model is built for it.

    Args:
        config: checked.
        ranks_per_node: unset: as this process was started (``LOCAL_WORLD_SIZE``), or all on one node.

    Raises:
        ValueError: trainer and engines do not fit together, or an engine would span nodes.
    """
    layout = ParallelLayout.from_config(config.parallel)
    planner = planner_between(
        Path(config.model.path),
        layout,
        tensor=config.rollout.tensor_parallel_size,
        engines=config.rollout.num_engines,
        whole_encoder=config.rollout.mm_enable_dp_encoder,
        ranks_per_node=ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size)),
    )
    _require_engines_on_nodes(planner)
    return planner


def planner_between(
    path: Path, layout: ParallelLayout, *, tensor: int, engines: int, whole_encoder: bool, ranks_per_node: int
) -> Planner:
    """From a trainer of ``layout`` to so many engines of ``tensor`` ranks, of the model whose config is in ``path``.

    Raises:
        ValueError: they do not fit together.
    """
    rows = held_parameters(path, layout)
    return Planner(
        TrainerSide(
            layout=layout,
            held=tuple(Held(stage=stage, chunk=chunk, entry=entry) for stage, chunk, entry in rows),
            ranks_per_node=ranks_per_node,
        ),
        EngineSide(table=engine_parameters(path, whole_encoder=whole_encoder), tensor=tensor, engines=engines),
        tensor_shapes(path),
    )


def _require_engines_on_nodes(planner: Planner) -> None:
    """An engine's processes are started by its leader, so they map the memory of the leader's node only."""
    per_node = planner.trainer.ranks_per_node
    share = planner.trainer.layout.world_size // planner.engine.engines
    for engine, devices in enumerate(planner.devices):
        nodes = {rank // per_node for rank in (engine * share, *devices)}
        require(
            len(nodes) == 1,
            f"engine {engine} would run on trainer ranks {list(devices)}, on nodes {sorted(nodes)} of {per_node} ranks "
            f"each; use at least rollout.num_engines={planner.trainer.layout.world_size // per_node}, so that each "
            "engine has one node, or reshard.method=reference",
        )
