"""Does every engine hold what the trainer means it to? Checksums of both sides, compared tensor by tensor.

What is expected is worked out from the trainer's shards alone: by the plan, each rank sums the rectangles that it
supplies, weighted by where they stand in the engine's parameter; the partial sums add up (``checksum.py``). What an
engine holds, its own processes say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from megatron_mmrl.reshard.checksum import as_number, checksum
from megatron_mmrl.reshard.execute import Memory
from megatron_mmrl.reshard.plan import Planner
from megatron_mmrl.rollout.engine import EngineError

Key = tuple[int, int]
"""Trainer rank on whose device the engine rank runs, and row of the engine's table."""


class WeightsDifferError(EngineError):
    """An engine holds other weights than the trainer; names tensor, engine and rank."""


class Verifier:
    """One rank's part in working out what the engines must hold."""

    def __init__(self, planner: Planner, rank: int, memory: Memory) -> None:
        self._planner = planner
        self._parts: dict[int, list[tuple[int, Tensor, int, int]]] = defaultdict(list)
        for move in planner.incoming(rank):
            fragment = move.fragment
            if move.kind == "alias":  # all of the shard: its rectangles stand where they stand in the parameter
                self._parts[fragment.entry].append((rank, memory.shard(rank, fragment), 0, 0))
            elif move.kind == "copy":
                part = memory.source(rank, fragment)
                self._parts[fragment.entry].append((rank, part, fragment.target.top, fragment.target.left))
        for move in planner.outgoing(rank):
            fragment = move.fragment
            part = memory.source(rank, fragment)
            self._parts[fragment.entry].append((move.peer, part, fragment.target.top, fragment.target.left))

    @torch.no_grad()
    def supplied(self, entries: Collection[int]) -> dict[Key, int]:
        """What this rank adds to the checksums of the engine parameters ``entries``."""
        keys, sums = [], []
        for entry in entries:
            for device, part, top, left in self._parts[entry]:
                keys.append((device, entry))
                sums.append(checksum(part, top=top, left=left))
        totals: dict[Key, int] = defaultdict(int)
        for key, value in zip(keys, torch.stack(sums).tolist() if sums else [], strict=True):  # one wait for the device
            totals[key] += value
        return {key: as_number(value) for key, value in totals.items()}

    def compare(
        self,
        engine: int,
        entries: Collection[int],
        supplied: Sequence[Mapping[Key, int]],
        reported: Sequence[Mapping[str, int]],
    ) -> None:
        """Hold what an engine's ranks ``reported`` against what the trainer's ranks ``supplied``.

        Raises:
            WeightsDifferError: names every tensor and rank that differ.
        """
        table = self._planner.engine.table
        wrong = [
            f"{table[entry].name} on rank {rank}"
            for rank, device in enumerate(self._planner.devices[engine])
            for entry in entries
            if as_number(sum(sums.get((device, entry), 0) for sums in supplied))
            != reported[rank].get(table[entry].name, -1)
        ]
        if wrong:
            shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise WeightsDifferError(
                f"engine {engine} holds other weights than the trainer: {shown}; the checksums of {len(wrong)} of "
                f"{len(entries) * len(reported)} tensors differ"
            )


def sample(num_entries: int, version: int, every: int) -> range:
    """Entries to check for ``version``: all where ``every`` divides it, else each ``every``-th, another lot each time.

    A version that is not checked in full checks one part in ``every``, so that each tensor is seen once in as many.
    """
    return range(num_entries) if version % every == 0 else range(version % every, num_entries, every)
