"""What a trainer rank keeps for weights that it shares with an engine: the plan, the memory, and who reads it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from megatron_mmrl.config import Config
from megatron_mmrl.config.checks import require
from megatron_mmrl.models.registry import engine_parameters, held_parameters, stored_model
from megatron_mmrl.parallel.device import device, dtype_of
from megatron_mmrl.parallel.geometry import as_matrix, shard_placement
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.execute import Executor, Memory
from megatron_mmrl.reshard.fragments import EngineSide, Held, TrainerSide
from megatron_mmrl.reshard.memory import Place, SharedBlock, SharedParameters
from megatron_mmrl.reshard.plan import Planner
from megatron_mmrl.reshard.spec import AttachSpec, RankMemory, arena_layout, attach_spec
from megatron_mmrl.reshard.verify import Verifier, sample

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel

T = TypeVar("T")


class Exchange(Protocol):
    """Collectives over all ranks, for values of our own ranks only."""

    rank: int
    world_size: int

    def all_gather(self, value: T) -> list[T]: ...

    def barrier(self) -> None: ...


def planner_of(config: Config) -> Planner:
    """The plan of a run, the same on every rank; no model is built for it.

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
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", layout.world_size)),
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
        stored_model(path).shapes,
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


class WeightSession:
    """One rank's memory, its steps at every hand-over, and its part in checking the outcome. Building it is collective.

    Args:
        planner: of the whole run.
        chunks: of the policy, after ``share_parameters``.
        shared: what that returned.
    """

    def __init__(
        self,
        config: Config,
        planner: Planner,
        chunks: Sequence[DistributedDataParallel],
        shared: SharedParameters,
        exchange: Exchange,
    ) -> None:
        self.planner, self._dtype = planner, config.model.dtype
        self._verify_every = config.reshard.verify_every
        dtype, rank = dtype_of(config.model.dtype), exchange.rank
        held = held_rows(planner, rank, chunks)
        places = {number: shared.place(parameter) for number, parameter in held.items()}
        arena_block, arena = _arena(planner, rank, dtype.itemsize, number=len(shared.blocks))
        self.blocks = (*shared.blocks, *([arena_block] if arena_block else []))
        own = RankMemory(handles=tuple(block.handle for block in self.blocks), held=places, arena=arena)
        fixed = {number for number, parameter in held.items() if not parameter.requires_grad}
        gathered = exchange.all_gather((own, fixed))
        self.memories: Sequence[RankMemory] = [memory for memory, _ in gathered]
        """Of every rank, in rank order."""
        frozen = frozenset[int]().union(*(numbers for _, numbers in gathered))
        memory = Memory(planner, rank, self.memories, [block.tensor for block in self.blocks], dtype)
        self.executor = Executor(planner, rank, memory, frozen=frozen, bucket_bytes=config.reshard.bucket_bytes)
        self.verifier = Verifier(planner, rank, memory)
        traffic = [asdict(one) for one in exchange.all_gather(self.executor.traffic)]
        self.traffic_bytes: Mapping[str, int] = {kind: sum(one[kind] for one in traffic) for kind in traffic[0]}
        """Over all ranks, by kind: see ``Traffic``."""

    def attach_specs(self, engine: int, answer_dir: Path) -> list[AttachSpec]:
        """What each rank of an engine is told, in rank order."""
        return [
            attach_spec(
                self.planner,
                rank,
                self.planner.incoming(device),
                self.memories[device],
                dtype=self._dtype,
                answer_dir=str(answer_dir),
            )
            for rank, device in enumerate(self.planner.devices[engine])
        ]

    def to_verify(self, version: int, *, everything: bool) -> range:
        """Rows of the engine's table whose checksums are compared at this version."""
        count = len(self.planner.engine.table)
        return range(count) if everything else sample(count, version, self._verify_every)

    def names(self, entries: Collection[int]) -> tuple[str, ...]:
        """The engine's names of rows of its table."""
        return tuple(self.planner.engine.table[entry].name for entry in entries)


def held_rows(planner: Planner, rank: int, chunks: Sequence[DistributedDataParallel]) -> dict[int, torch.nn.Parameter]:
    """This rank's parameters by row of the planner's ``held``.

    Raises:
        ValueError: the model has other parameters, or of another shape, than was planned.
    """
    trainer = planner.trainer
    at = trainer.layout.coordinates(rank)
    numbers = {
        (held.chunk, held.entry.hf_names): number
        for number, held in enumerate(trainer.held)
        if held.stage == at.pipeline
    }
    rows: dict[int, torch.nn.Parameter] = {}
    for index, chunk in enumerate(chunks):
        table = chunk.module.weight_table()
        for name, parameter in chunk.module.named_parameters():
            entry = table[name]
            number = numbers.pop((index, entry.hf_names), None)
            require(number is not None, f"parameter {name} of chunk {index} on rank {rank} was not planned")
            full = tuple(planner.fragments.shapes[hf_name] for hf_name in entry.hf_names)
            planned = shard_placement(entry.rule, full, at.tensor, trainer.layout.tensor).shape
            require(
                as_matrix(tuple(parameter.shape)) == as_matrix(planned),
                f"parameter {name} on rank {rank} has shape {list(parameter.shape)}, planned was {list(planned)}",
            )
            rows[number] = parameter
    require(not numbers, f"rank {rank} has no parameter for {[names for _, names in numbers]}, which were planned")
    return rows


def _arena(planner: Planner, rank: int, item_bytes: int, *, number: int) -> tuple[SharedBlock | None, dict[int, Place]]:
    """Memory of this rank's engine rank that is not the trainer's own, as block ``number``; none if there is none."""
    if rank not in planner.runs:
        return None, {}
    offsets, nbytes = arena_layout(planner, planner.runs[rank], planner.incoming(rank), item_bytes)
    if nbytes == 0:
        return None, {}
    return SharedBlock(nbytes, device()), {entry: (number, offset) for entry, offset in offsets.items()}
