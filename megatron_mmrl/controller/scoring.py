"""Rewards over all ranks: each rank scores its share with workers of its own, and every rank learns all scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_mmrl.types import Group

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Exchange


class Pool(Protocol):
    """Worker processes that score responses under a time limit (``rewards.pool.RewardPool``)."""

    def submit(self, group: Group) -> None:
        """Have a group scored some time; returns at once."""
        ...

    def has(self, group: Group) -> bool:
        """Whether it was submitted here."""
        ...

    def score(self, groups: Sequence[Group]) -> list[Group]: ...

    def counters(self) -> dict[str, float]:
        """Time-outs and errors since the last call."""
        ...


class Scorer:
    """Scores groups; every call but ``submit`` is collective."""

    def __init__(self, pool: Pool, exchange: Exchange) -> None:
        self._pool, self._exchange = pool, exchange

    def submit(self, group: Group) -> None:
        """Have this rank's workers begin with a group that ``score`` will be asked for; from any thread."""
        self._pool.submit(group)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their scores, in the given order, on every rank.

        A rank scores what it was given before; the rest is dealt out. Scores do not depend on who makes them.
        """
        begun = self._exchange.all_gather([self._pool.has(group) for group in groups])
        owners = [_owner([has[index] for has in begun], index) for index in range(len(groups))]
        own = [index for index, owner in enumerate(owners) if owner == self._exchange.rank]
        scored = self._pool.score([groups[index] for index in own])
        shares = self._exchange.all_gather([group.scores or () for group in scored])
        queues = [iter(share) for share in shares]
        return [group.with_scores(next(queues[owner])) for group, owner in zip(groups, owners, strict=True)]

    def counters(self) -> dict[str, float]:
        """Sums over the ranks since the last call: ``reward/timeouts``, ``reward/errors``."""
        counts = self._exchange.all_gather(self._pool.counters())
        return {name: sum(count[name] for count in counts) for name in counts[0]}


def _owner(has: Sequence[bool], index: int) -> int:
    """The rank that scores group ``index``: the first that has it, else each in turn."""
    return has.index(True) if any(has) else index % len(has)
