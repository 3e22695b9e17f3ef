"""Carry out a rank's plan: from the trainer's shards, its own and others', into the arena that its engine rank reads.

What is shared (``alias``) takes no step at all. Within a node a rank reads the rectangles that it needs straight out of
the other rank's memory, which it has mapped once; between nodes they travel as streams of bounded messages. The plan is
resolved once, to pairs of views, and replayed at every hand-over.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mmrl.parallel.geometry import Rect, as_matrix
from megatron_mmrl.reshard.fragments import Fragment
from megatron_mmrl.reshard.memory import open_block, typed
from megatron_mmrl.reshard.plan import Move, Planner
from megatron_mmrl.reshard.spec import RankMemory
from megatron_mmrl.reshard.stream import Stream, cut, exchange, message_elements

Copies = tuple[list[Tensor], list[Tensor]]  # targets, sources: matrices of equal shape, pair by pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of one rank's plan, by how they come to be where the engine reads them."""

    alias: int
    copy: int
    pull: int
    """Copied from another rank of the node."""
    receive: int
    """Sent by a rank of another node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    copies: Copies
    streams: tuple[Stream, ...]


class Memory:
    """The weights of all ranks that this rank can reach, as matrices.

    Args:
        memories: of every rank, in rank order.
        own: this rank's blocks, in the order of its handles; other ranks' are mapped when first asked for, and kept.
        dtype: of every weight.
    """

    def __init__(
        self, planner: Planner, rank: int, memories: Sequence[RankMemory], own: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self._planner, self._rank, self._memories, self._own, self.dtype = planner, rank, memories, own, dtype
        self._block = functools.cache(self._find_block)

    def source(self, rank: int, fragment: Fragment) -> Tensor:
        """The fragment in the shard of ``rank``."""
        return self.shard(rank, fragment)[_slices(fragment.source)]

    def shard(self, rank: int, fragment: Fragment) -> Tensor:
        """The whole shard of ``rank`` that the fragment is from."""
        shape = self._planner.fragments.shard(fragment).shape
        return self._matrix(rank, self._memories[rank].held[fragment.held], shape)

    def target(self, fragment: Fragment) -> Tensor:
        """The fragment in this rank's arena."""
        placement = self._planner.fragments.placements(self._planner.runs[self._rank])[fragment.entry]
        place = self._memories[self._rank].arena[fragment.entry]
        return self._matrix(self._rank, place, placement.shape)[_slices(fragment.target)]

    def _matrix(self, rank: int, place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        number, offset = place
        return typed(self._block(rank, number), offset, as_matrix(shape), self.dtype)

    def _find_block(self, rank: int, number: int) -> Tensor:
        return self._own[number] if rank == self._rank else open_block(self._memories[rank].handles[number])


class Executor:
    """One rank's part in every hand-over.

    Args:
        frozen: rows of the planner's ``held`` that are not trained: moved the first time only.
        bucket_bytes: staging of a rank between nodes takes at most so much.

    Raises:
        ValueError: ``bucket_bytes`` is too small for the plan.
    """

    def __init__(
        self, planner: Planner, rank: int, memory: Memory, *, frozen: Set[int] = frozenset(), bucket_bytes: int
    ) -> None:
        self._planner, self._rank, self._memory = planner, rank, memory
        self._bucket_bytes = bucket_bytes
        self._incoming = planner.incoming(rank)
        outgoing = planner.outgoing(rank)
        limits = self._message_limits()
        self._steps = [  # of what is trained, of what is frozen
            self._resolve(
                [move for move in self._incoming if (move.fragment.held in frozen) == of_frozen],
                [move for move in outgoing if (move.fragment.held in frozen) == of_frozen],
                limits,
            )
            for of_frozen in (False, True)
        ]

    @functools.cached_property
    def traffic(self) -> Traffic:
        """Bytes that make this rank's engine parameters, frozen ones included."""
        size: Counter[str] = Counter()
        for move in self._incoming:
            if move.kind == "alias":
                size["alias"] += self._memory.shard(self._rank, move.fragment).nbytes
            else:
                far = move.kind == "receive" and self._is_far(move.peer)
                near = "pull" if move.kind == "receive" else "copy"
                size["receive" if far else near] += move.fragment.source.size * self._memory.dtype.itemsize
        return Traffic(alias=size["alias"], copy=size["copy"], pull=size["pull"], receive=size["receive"])

    @torch.no_grad()
    def run(self, *, everything: bool) -> int:
        """Bring the arena up to date; returns the bytes of staging that it took.

        Every rank calls it when all ranks' weights are final, and changes no weight before all have returned.

        Args:
            everything: frozen weights too; equal on every rank.
        """
        staging = 0
        for steps in self._steps if everything else self._steps[:1]:
            targets, sources = steps.copies
            if targets:
                torch._foreach_copy_(targets, sources)
            staging = max(staging, exchange(steps.streams, self._bucket_bytes))
        return staging

    def _resolve(
        self, incoming: Sequence[Move], outgoing: Sequence[Move], limits: Mapping[tuple[int, int], int]
    ) -> _Steps:
        copies: Copies = ([], [])
        views: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # by sender and receiver
        for move in incoming:
            if move.kind == "receive" and self._is_far(move.peer):
                views[move.peer, self._rank].append(self._memory.target(move.fragment))
            elif move.kind != "alias":
                copies[0].append(self._memory.target(move.fragment))
                copies[1].append(self._memory.source(move.peer, move.fragment))
        for move in outgoing:
            if self._is_far(move.peer):
                views[self._rank, move.peer].append(self._memory.source(self._rank, move.fragment))
        streams = tuple(
            Stream(
                peer=receiver if sender == self._rank else sender,
                sends=sender == self._rank,
                messages=cut(own, limits[sender, receiver]),
            )
            for (sender, receiver), own in sorted(views.items())
        )
        return _Steps(copies=copies, streams=streams)

    def _message_limits(self) -> dict[tuple[int, int], int]:
        """(sender, receiver) -> elements of a message, for all pairs of ranks on different nodes."""
        pairs = {
            (sender, receiver)
            for receiver, suppliers in self._planner.suppliers.items()
            for sender in suppliers.values()
            if self._node(sender) != self._node(receiver)
        }
        streams = Counter(rank for pair in pairs for rank in pair)
        item = self._memory.dtype.itemsize
        return {pair: message_elements(self._bucket_bytes, item, max(streams[rank] for rank in pair)) for pair in pairs}

    def _is_far(self, peer: int) -> bool:
        return self._node(peer) != self._node(self._rank)

    def _node(self, rank: int) -> int:
        return rank // self._planner.trainer.ranks_per_node


def _slices(rect: Rect) -> tuple[slice, slice]:
    return slice(rect.top, rect.bottom), slice(rect.left, rect.right)
