"""What ranks tell each other outside the tensors of the model: small Python objects over gloo.

Objects travel pickled, between ranks of this run only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Collectives:
    """Every method is collective: each rank of the world calls it, in the same order."""

    def __init__(self) -> None:
        # The control plane needs no device: on NCCL it has a gloo group of its own.
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values  # type: ignore[return-value]  # filled by the call

    def broadcast(self, value: T | None, src: int = 0) -> T:
        """The value of rank ``src``; what other ranks pass is ignored."""
        holder = [value]
        dist.broadcast_object_list(holder, src=src, group=self._group)
        return holder[0]  # type: ignore[return-value]  # rank src passed a T

    def barrier(self) -> None:
        """Return when every rank has come here."""
        dist.barrier(group=self._group)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum over ranks, key by key; correctly rounded, so bit-equal on every rank.

        Raises:
            ValueError: on every rank, when ranks pass different keys.
        """
        gathered = self.all_gather(dict(values))
        for rank, other in enumerate(gathered):
            if other.keys() != gathered[0].keys():
                raise ValueError(f"rank 0 sums {sorted(gathered[0])}, rank {rank} sums {sorted(other)}")
        return {key: math.fsum(other[key] for other in gathered) for key in gathered[0]}
