"""How fast each group of ranks sums a tensor: the first sign of a slow cable, a wrong interface or a missing driver."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mmrl.parallel.collectives import Collectives
from megatron_mmrl.parallel.device import device, on_cuda, synchronize
from megatron_mmrl.parallel.state import communication_groups

_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
_REPEATS = 3
_ENOUGH_S = 0.25  # a first one that takes longer is not repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpeed:
    """All-reduce in one group."""

    kind: str  # tensor, context, data or pipeline
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float  # of one all-reduce, on the slowest rank

    @property
    def gb_per_s(self) -> float:
        """Algorithm bandwidth: bytes of the tensor over time, in 1e9 bytes per second."""
        return self.num_bytes / self.seconds / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSpeed:
    """All groups of a kind together."""

    kind: str
    num_groups: int
    median_gb_per_s: float
    slowest: GroupSpeed


def by_kind(speeds: Iterable[GroupSpeed]) -> list[KindSpeed]:
    """One for each kind."""
    kinds: dict[str, list[GroupSpeed]] = defaultdict(list)
    for speed in speeds:
        kinds[speed.kind].append(speed)
    return [
        KindSpeed(
            kind=kind,
            num_groups=len(groups),
            median_gb_per_s=statistics.median(speed.gb_per_s for speed in groups),
            slowest=min(groups, key=lambda speed: speed.gb_per_s),
        )
        for kind, groups in kinds.items()
    ]


def measure_groups(exchange: Collectives) -> list[GroupSpeed]:
    """Of every group of more than one rank, all groups of a kind at the same time. Collective; equal on every rank."""
    own = [_measure(kind, group) for kind, group in communication_groups().items()]
    speeds = [speed for part in exchange.all_gather(own) for speed in part]
    return sorted(set(speeds), key=lambda speed: (speed.kind, speed.ranks))


def _measure(kind: str, group: dist.ProcessGroup) -> GroupSpeed:
    num_bytes = _BYTES["cuda" if on_cuda() else "cpu"]
    tensor = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device())
    _timed(tensor[: 1 << 10], group)  # connects the ranks
    seconds = _timed(tensor, group)
    if seconds < _ENOUGH_S:  # the same on every rank of the group
        seconds = min(_timed(tensor, group) for _ in range(_REPEATS))
    ranks = tuple(dist.get_process_group_ranks(group))
    return GroupSpeed(kind=kind, ranks=ranks, num_bytes=num_bytes, seconds=seconds)


def _timed(tensor: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Seconds on the slowest rank."""
    dist.barrier(group)
    synchronize()
    start = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    synchronize()
    slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=device())
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return float(slowest)
