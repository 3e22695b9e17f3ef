"""A launch in words, for ``--dry-run``: the resolved configuration and where every rank and engine would be. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mmrl.cluster.plan import LaunchPlan
from megatron_mmrl.config import Config, dump_config


def describe(config: Config, plan: LaunchPlan) -> str:
    """The configuration as YAML, then the map of ranks and engines as comments to it. Ends with a line break."""
    topology = plan.topology
    head = f"{topology.num_nodes} node(s) x {topology.ranks_per_node} = {topology.world_size} ranks"
    sections = [head, "", *_rank_table(plan), "", *_engine_table(plan)]
    return dump_config(config) + "".join(f"# {line}".rstrip() + "\n" for line in sections)


def _rank_table(plan: LaunchPlan) -> list[str]:
    rows: list[Sequence[str]] = [("rank", "node", "device", "tensor", "pipeline", "context", "data")]
    for place in plan.ranks:
        at = place.at
        numbers = (place.rank, place.node, place.device, at.tensor, at.pipeline, at.context, at.data)
        rows.append([str(number) for number in numbers])
    return _aligned(rows)


def _engine_table(plan: LaunchPlan) -> list[str]:
    rows = [("engine", "node", "leader", "on the devices of ranks")]
    rows += [
        (str(place.engine), str(place.node), str(place.leader), " ".join(str(rank) for rank in place.ranks))
        for place in plan.engines
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
