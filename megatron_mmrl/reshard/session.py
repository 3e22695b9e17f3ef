"""What a trainer rank keeps for weights that it shares with an engine: the plan, the memory, and who reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from megatron_mmrl.config import Config
from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.device import device, dtype_of
from megatron_mmrl.parallel.geometry import as_matrix, shard_placement
from megatron_mmrl.reshard.execute import Executor, Memory
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
