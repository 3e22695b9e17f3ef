"""Which rank leads which engine, and which prompts go to which engine. Pure."""

from __future__ import annotations

import itertools


def leader_ranks(num_engines: int, world_size: int) -> tuple[int, ...]:
    """The rank that starts and talks to each engine: the first of each of ``num_engines`` equal runs of ranks.

    Raises:
        ValueError: the engines do not divide the ranks.
    """
    if world_size % num_engines != 0:
        raise ValueError(f"rollout.num_engines={num_engines} does not divide the {world_size} trainer processes")
    return tuple(range(0, world_size, world_size // num_engines))


def shares(num_prompts: int, num_engines: int) -> tuple[slice, ...]:
    """A contiguous share of ``num_prompts`` for each engine; lengths differ by one at most, longer ones first."""
    base, extra = divmod(num_prompts, num_engines)
    starts = [engine * base + min(engine, extra) for engine in range(num_engines + 1)]
    return tuple(slice(start, stop) for start, stop in itertools.pairwise(starts))
