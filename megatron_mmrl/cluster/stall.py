"""Whether a run has stalled, and whose fault it is: from what its ranks last said. Pure.

A rank that waits for others is no culprit while one of them works, however long that takes; it is as stuck as they
are. So a run has stalled when a rank that does not wait has got nowhere for the limit, or when no rank has got anywhere
for it. A rank that said nothing for some time has, as far as anyone knows, done nothing since.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_TABLE_LINES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """What a rank last said of itself, and how long ago."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    entered: int  # phases entered since the start
    idle_s: float  # without progress, when it said so
    waits: bool  # for other ranks
    does: str  # its main thread's innermost line
    silent_s: float = 0.0

    @property
    def stuck_s(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.idle_s + self.silent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """Why the run ends: one line, and the ranks it is about."""

    culprit: RankState
    message: str


def find_stall(states: Sequence[RankState], *, timeout_s: float, answers_within_s: float) -> Stall | None:
    """The stall of the run, if there is one.

    Args:
        states: of every rank that has not left.
        timeout_s: so long without progress is a stall.
        answers_within_s: a rank that has been silent for longer does not answer.
    """
    silent = [state for state in states if state.silent_s > answers_within_s]
    working = [state for state in states if state.silent_s <= answers_within_s and not state.waits]
    stuck = [state for state in working if state.stuck_s > timeout_s]
    if not stuck and not (states and all(state.stuck_s > timeout_s for state in states)):
        return None
    if silent:
        culprit = max(silent, key=lambda state: (state.silent_s, -state.rank))
        return Stall(culprit=culprit, message=_silent(culprit, len(silent)))
    if stuck or working:
        culprit = max(stuck or working, key=lambda state: (state.stuck_s, -state.rank))
        return Stall(culprit=culprit, message=f"no progress for {culprit.stuck_s:.0f} s {_where(culprit)}")
    culprit = min(states, key=lambda state: (state.entered, -state.stuck_s, state.rank))
    message = f"every rank waits for another; this one came least far: no progress for {culprit.stuck_s:.0f} s "
    return Stall(culprit=culprit, message=message + _where(culprit))


def store_lost(own: RankState, server: RankState | None, address: str, *, timeout_s: float) -> Stall | None:
    """The stall as a rank sees it that can no longer read what the others say.

    Args:
        own: of the rank that asks.
        server: what the rank that serves the store last said; None: a launcher serves it.
        address: of the store.
        timeout_s: so long without progress is a stall.
    """
    if own.stuck_s <= timeout_s:
        return None  # the run does not need the store
    if server is not None:
        return Stall(culprit=server, message=_silent(server, 1))
    message = f"no progress for {own.stuck_s:.0f} s {_where(own)}; the launcher's store at {address} does not answer"
    return Stall(culprit=own, message=message)


def table(states: Sequence[RankState], answers_within_s: float) -> str:
    """One line for all ranks that are in the same place, the longest stuck first."""
    alike: dict[tuple[str, str, int, str], list[RankState]] = defaultdict(list)
    for state in states:
        silent = state.silent_s > answers_within_s
        how = "does not answer; was" if silent else ("waits for others," if state.waits else "works,")
        alike[how, state.phase, state.step, state.does].append(state)
    lines = []
    for (how, phase, step, does), members in alike.items():
        longest = max(state.stuck_s for state in members)
        hosts = list(dict.fromkeys(state.host for state in members))
        who = f"{numbers([state.rank for state in members])} on {', '.join(hosts[:3])}{', ...' * (len(hosts) > 3)}"
        lines.append((longest, f"  {who}: {how} in phase {phase}, step {step}, stuck for {longest:.0f} s, {does}"))
    shown = [line for _, line in sorted(lines, key=lambda item: -item[0])]
    more = [f"  ... and {len(shown) - _TABLE_LINES} more"] if len(shown) > _TABLE_LINES else []
    return "\n".join(["what the ranks do:", *shown[:_TABLE_LINES], *more])


def numbers(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join("-".join(map(str, run)) for run in runs)


def _silent(culprit: RankState, others: int) -> str:
    more = f" ({others} ranks do not)" if others > 1 else ""
    return (
        f"has not answered for {culprit.silent_s:.0f} s{more}: its process or machine is stopped, gone or cut off, or "
        f"a call holds Python's lock; last heard of {_where(culprit)}"
    )


def _where(state: RankState) -> str:
    return f"in phase {state.phase} of step {state.step} on {state.host} (process {state.pid}), at {state.does}"
