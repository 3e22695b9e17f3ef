"""Which bytes of the trainer's shards become which bytes of the engines', and over which way. Pure, and the same on
every rank without asking another.

An engine rank runs on a trainer rank's device. Of what it needs, that trainer rank has a part in its own memory: shared
as it is (``alias``: the same numbers in the same places) or copied into place. The rest is received from the nearest
trainer rank that holds it. Which engine rank runs on which device is part of the plan, and decides how much that is.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.geometry import Shape, as_matrix
from megatron_mmrl.parallel.layout import Coordinates
from megatron_mmrl.reshard.fragments import ANY, EngineSide, Fragment, Fragments, TrainerSide

Kind = Literal["alias", "copy", "receive", "send"]
Source = tuple[int, int]
"""Pipeline stage, and tensor-parallel rank or ANY."""


@dataclass(frozen=True, slots=True)
class Move:
    """An entry of a rank's plan."""

    kind: Kind
    peer: int
    """Trainer rank on the other side; this rank itself for alias and copy."""
    fragment: Fragment


class Planner:
    """Plans a hand-over between two layouts.

    Args:
        shapes: of every full tensor, by Hugging Face name.

    Raises:
        ValueError: engines that do not fit on the ranks, or need a tensor that no rank holds.
    """

    def __init__(self, trainer: TrainerSide, engine: EngineSide, shapes: Mapping[str, Shape]) -> None:
        world = trainer.layout.world_size
        require(
            world % engine.engines == 0 and engine.tensor <= world // engine.engines,
            f"{engine.engines} engines of {engine.tensor} ranks each do not fit on {world} trainer ranks: each has an "
            "equal share of the ranks and needs one for each of its own",
        )
        self.trainer, self.engine = trainer, engine
        self.fragments = Fragments(trainer, engine, shapes)

    @functools.cached_property
    def devices(self) -> tuple[tuple[int, ...], ...]:
        """For each engine, the trainer ranks on whose devices its ranks run: the choice with the least traffic.

        Engines whose shares of the ranks make up a node choose among all of its devices; others among their share.
        """
        world = self.trainer.layout.world_size
        per_node = min(world, self.trainer.ranks_per_node)
        share = world // self.engine.engines
        together = per_node // share if per_node % share == 0 and world % per_node == 0 else 1
        size = share * together
        return tuple(
            devices for first in range(0, world, size) for devices in self._assign(range(first, first + size), together)
        )

    @functools.cached_property
    def runs(self) -> Mapping[int, int]:
        """Trainer rank -> the engine rank on its device; those without one are left out."""
        return {device: rank for devices in self.devices for rank, device in enumerate(devices)}

    @functools.cached_property
    def suppliers(self) -> Mapping[int, Mapping[Source, int]]:
        """For each trainer rank with an engine rank, who supplies what: itself, or the nearest that has it.

        Near is the same node; among equally near replicas it is the one with the least to send so far.
        """
        loads: dict[int, int] = defaultdict(int)
        return {device: self._suppliers_of(device, rank, loads) for device, rank in sorted(self.runs.items())}

    def incoming(self, device: int) -> list[Move]:
        """How the engine rank on trainer rank ``device`` comes by its parameters, in their order."""
        if device not in self.runs:
            return []
        rank, suppliers = self.runs[device], self.suppliers[device]
        by_entry: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in self.fragments.of(rank, self._stage(device)):
            by_entry[fragment.entry].append(fragment)
        moves: list[Move] = []
        for entry, fragments in by_entry.items():
            peers = [suppliers[self._source(fragment)] for fragment in fragments]
            if set(peers) == {device} and self._is_whole_shard(rank, entry, fragments):
                moves.append(Move("alias", device, fragments[0]))
            else:
                moves += [
                    Move("copy" if peer == device else "receive", peer, fragment)
                    for peer, fragment in zip(peers, fragments, strict=True)
                ]
        return moves

    def outgoing(self, device: int) -> list[Move]:
        """What trainer rank ``device`` sends, peer after peer, each in the order in which the peer receives it."""
        moves: list[Move] = []
        for other, suppliers in self.suppliers.items():
            wanted = {source for source, peer in suppliers.items() if peer == device and other != device}
            if wanted:
                fragments = self.fragments.of(self.runs[other], self._stage(other))
                moves += [Move("send", other, fragment) for fragment in fragments if self._source(fragment) in wanted]
        return moves

    def wire_elements(self) -> int:
        """Numbers that cross from one trainer rank to another, over all ranks."""
        return sum(
            size
            for device, rank in self.runs.items()
            for source, size in self.fragments.sizes(rank, self._stage(device)).items()
            if self.suppliers[device][source] != device
        )

    def _assign(self, ranks: range, engines: int) -> list[tuple[int, ...]]:
        """Devices out of ``ranks`` for each of so many engines."""
        gain = [[self._local_elements(rank, device) for device in ranks] for rank in range(self.engine.tensor)]
        _, columns = linear_sum_assignment(np.repeat(gain, engines, axis=0), maximize=True)
        chosen = [ranks[int(column)] for column in columns]  # engine rank by engine rank
        of_rank = [sorted(chosen[first : first + engines]) for first in range(0, len(chosen), engines)]
        return list(zip(*of_rank, strict=True))

    def _local_elements(self, rank: int, device: int) -> int:
        """What engine rank ``rank`` would find in the memory of trainer rank ``device``."""
        at = self.trainer.layout.coordinates(device)
        sizes = self.fragments.sizes(rank, at.pipeline)
        return sizes.get((at.pipeline, at.tensor), 0) + sizes.get((at.pipeline, ANY), 0)

    def _suppliers_of(self, device: int, rank: int, loads: dict[int, int]) -> dict[Source, int]:
        at = self.trainer.layout.coordinates(device)
        node = device // self.trainer.ranks_per_node
        chosen = {}
        for (stage, tensor), size in sorted(self.fragments.sizes(rank, at.pipeline).items()):
            if stage == at.pipeline and tensor in (at.tensor, ANY):
                chosen[stage, tensor] = device
                continue
            replicas = self._replicas(stage, at.tensor if tensor == ANY else tensor)
            best = min(replicas, key=lambda other: (other // self.trainer.ranks_per_node != node, loads[other], other))
            loads[best] += size
            chosen[stage, tensor] = best
        return chosen

    def _replicas(self, stage: int, tensor: int) -> list[int]:
        layout = self.trainer.layout
        return [
            layout.rank(Coordinates(tensor=tensor, context=context, data=data, pipeline=stage))
            for data in range(layout.data)
            for context in range(layout.context)
        ]

    def _stage(self, device: int) -> int:
        return self.trainer.layout.coordinates(device).pipeline

    def _source(self, fragment: Fragment) -> Source:
        return self.trainer.held[fragment.held].stage, fragment.tensor

    def _is_whole_shard(self, rank: int, entry: int, fragments: Sequence[Fragment]) -> bool:
        """The engine's parameter is one parameter of the trainer, every number in the same place."""
        shard, parameter = self.fragments.shard(fragments[0]), self.fragments.placements(rank)[entry]
        return (
            len({fragment.held for fragment in fragments}) == 1
            and as_matrix(shard.shape) == as_matrix(parameter.shape)
            and all(fragment.source == fragment.target for fragment in fragments)
            and sum(fragment.source.size for fragment in fragments) == sum(piece.of.size for piece in shard.pieces)
        )
