"""Rewards over all ranks: each rank scores its share with workers of its own, and every rank learns all scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_mmrl.types import Group

if TYPE_CHECKING:
    from megatron_mmrl.controller.parts import Exchange


class Pool(Protocol):
    """Worker processes that score responses under a time limit (``rewards.pool.RewardPool``)."""

    def score(self, groups: Sequence[Group]) -> list[Group]: ...

    def counters(self) -> dict[str, float]:
        """Time-outs and errors since the last call."""
        ...


class Scorer:
    """Scores groups; every call is collective."""

    def __init__(self, pool: Pool, exchange: Exchange) -> None:
        self._pool, self._exchange = pool, exchange

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their scores, in the given order, on every rank."""
        ranks = self._exchange.world_size
        mine = self._pool.score(groups[self._exchange.rank :: ranks])
        shares = self._exchange.all_gather([group.scores or () for group in mine])
        return [group.with_scores(shares[index % ranks][index // ranks]) for index, group in enumerate(groups)]

    def counters(self) -> dict[str, float]:
        """Sums over the ranks since the last call: ``reward/timeouts``, ``reward/errors``."""
        counts = self._exchange.all_gather(self._pool.counters())
        return {name: sum(count[name] for count in counts) for name in counts[0]}
