"""Which rank runs where, before any of them does. Pure; equal input gives an equal plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mmrl.config import Config, ConfigError
from megatron_mmrl.parallel.layout import Coordinates, ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Nodes with equally many ranks each; rank r is on node r // ranks_per_node."""

    num_nodes: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.num_nodes * self.ranks_per_node

    def ranks_of(self, node: int) -> range:
        """The ranks on ``node``."""
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where a rank runs and which part of the model it holds."""

    rank: int
    node: int
    device: int  # on its node
    at: Coordinates


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """Where an engine runs."""

    engine: int
    node: int
    leader: int  # the rank that starts it and talks to it
    ranks: tuple[int, ...]  # whose devices its tensor-parallel ranks use, in their order


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """All places of a run."""

    topology: Topology
    ranks: tuple[RankPlace, ...]
    engines: tuple[EnginePlace, ...]


def topology_of(config: Config, num_nodes: int, ranks_per_node: int | None = None) -> Topology:
    """The ranks of ``config`` over ``num_nodes``.

    Raises:
        ConfigError: they do not share out evenly, or the given number per node does not make up the world.
    """
    world = config.parallel.world_size
    if num_nodes < 1 or world % num_nodes != 0:
        fitting = [nodes for nodes in range(1, world + 1) if world % nodes == 0]
        raise ConfigError(f"--nodes {num_nodes} does not divide the {world} ranks of the layout; use one of {fitting}")
    if ranks_per_node is not None and num_nodes * ranks_per_node != world:
        raise ConfigError(
            f"--nodes {num_nodes} x --gpus-per-node {ranks_per_node} are {num_nodes * ranks_per_node} devices, but the "
            f"parallel sizes need {world}; set parallel.data_parallel_size or the number of nodes"
        )
    return Topology(num_nodes=num_nodes, ranks_per_node=world // num_nodes)


def own_devices(config: Config) -> tuple[tuple[int, ...], ...]:
    """Per engine the first of its own share of ranks: where it runs when it shares no memory with them."""
    share = config.parallel.world_size // config.rollout.num_engines
    firsts = range(0, config.parallel.world_size, share)
    return tuple(tuple(range(first, first + config.rollout.tensor_parallel_size)) for first in firsts)


def plan_launch(config: Config, topology: Topology, engine_ranks: Sequence[Sequence[int]]) -> LaunchPlan:
    """Every rank's and every engine's place.

    Args:
        config: checked.
        topology: of as many ranks as the configuration's layout has.
        engine_ranks: per engine, the ranks whose devices it uses, in the order of its own ranks.

    Raises:
        ConfigError: an engine would span nodes, which share no memory.
    """
    layout = ParallelLayout.from_config(config.parallel)
    share = topology.world_size // config.rollout.num_engines
    places = tuple(
        RankPlace(
            rank=rank,
            node=rank // topology.ranks_per_node,
            device=rank % topology.ranks_per_node,
            at=layout.coordinates(rank),
        )
        for rank in range(topology.world_size)
    )
    engines = tuple(
        EnginePlace(engine=engine, node=places[ranks[0]].node, leader=engine * share, ranks=tuple(ranks))
        for engine, ranks in enumerate(engine_ranks)
    )
    for engine in engines:
        nodes = sorted({places[rank].node for rank in (engine.leader, *engine.ranks)})
        if len(nodes) > 1:
            raise ConfigError(
                f"engine {engine.engine} would run on nodes {nodes}; rollout.tensor_parallel_size="
                f"{config.rollout.tensor_parallel_size} and rollout.num_engines={config.rollout.num_engines} must keep "
                f"every engine within the {topology.ranks_per_node} ranks of a node"
            )
    return LaunchPlan(topology=topology, ranks=places, engines=engines)
