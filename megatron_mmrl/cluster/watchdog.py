"""Ends a run that has stalled, with the rank whose fault it is and the stacks of all, instead of hanging for ever.

Every rank has a watchdog. They tell each other how far their ranks are (``board.py``), decide from that whether the run
has stalled (``stall.py``), and then each writes its rank's stacks, records the cause and ends its process. Two nets are
below, for a rank whose watchdog cannot run because a call in C holds Python's lock: faulthandler writes its stacks
after ``timeout_s``, and the kernel ends the process (SIGALRM) after twice that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from megatron_mmrl import pulse
from megatron_mmrl.cluster.board import Board, Meeting, Row
from megatron_mmrl.cluster.failure import STALLED, Failure, end_run
from megatron_mmrl.cluster.stacks import all_stacks, main_thread_does, main_thread_waits
from megatron_mmrl.cluster.stall import RankState, find_stall, store_lost, table

_STATE, _LEFT, _VERDICT = "state", "left", "verdict"  # of a row: how far; has ended well; why the run has to end
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 0.2, 5.0
_RANKS_PER_SECOND = 50  # of interval: what one store can serve
_MIN_ANSWER_S = 2.0
_CLOSING_S = 0.1


@contextlib.contextmanager
def watched(timeout_s: float, log_dir: Path) -> Iterator[None]:
    """Watch this process, a rank, inside the block; ``timeout_s=0``: do not. To be called from the main thread.

    Args:
        timeout_s: so long without progress ends the run.
        log_dir: for ``stacks-rank<N>.txt``; made if missing.
    """
    if timeout_s == 0:
        yield
        return
    watchdog = Watchdog(timeout_s, log_dir, Meeting.from_environment())
    try:
        yield
    except BaseException:
        watchdog.close(left=False)  # silent from here on
        raise
    watchdog.close(left=True)


class Watchdog:
    """A thread that watches this rank, and with the others' all ranks. Ends the process when the run has stalled."""

    def __init__(self, timeout_s: float, log_dir: Path, meeting: Meeting | None) -> None:
        self._timeout_s, self._meeting = timeout_s, meeting
        self._rank, self._world = (meeting.rank, meeting.world_size) if meeting else (0, 1)
        slowest = _MAX_INTERVAL_S + self._world / _RANKS_PER_SECOND
        self._interval_s = max(_MIN_INTERVAL_S, min(timeout_s / 20, slowest))
        self._answers_within_s = max(_MIN_ANSWER_S, 4 * self._interval_s)
        log_dir.mkdir(parents=True, exist_ok=True)
        self._path = log_dir / f"stacks-rank{self._rank}.txt"
        self._file = self._path.open("w", encoding="utf-8")
        self._host, self._started = socket.gethostname(), time.monotonic()
        pulse.beat()  # what was before is not watched
        first = replace(self._own(), waits=False, does="the start of its watchdog")
        self._board = Board(meeting, {_STATE: asdict(first)}, self._interval_s) if meeting else None
        self._stop = threading.Event()
        self._rearm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self, *, left: bool) -> None:
        """Stop watching; ``left``: tell the others that this rank is not missing."""
        self._stop.set()
        self._thread.join()
        if self._board is not None:
            if left:
                self._board.post({_LEFT: True})
            self._board.close()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()

    def _watch(self) -> None:
        try:
            self._look()
        finally:  # nobody renews the nets any more
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._interval_s):
            now = time.monotonic()
            away, last = now - last - self._interval_s, now
            if away > self._answers_within_s:  # stopped, or without Python's lock: the others' rows are old, not they
                self._forgive(away)
            self._rearm()
            if self._board is not None:
                self._board.post(self._row())
            cause = self._find()
            if cause is not None:
                self._end(cause)

    def _rearm(self) -> None:
        faulthandler.dump_traceback_later(self._timeout_s, file=self._file)
        signal.setitimer(signal.ITIMER_REAL, 2 * self._timeout_s + _MIN_ANSWER_S)

    def _forgive(self, seconds: float) -> None:
        pulse.forgive(seconds)
        if self._board is not None:
            self._board.forgive(seconds)

    def _own(self) -> RankState:
        mark = pulse.mark()
        return RankState(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            phase=mark.phase,
            step=mark.step,
            entered=mark.entered,
            idle_s=mark.idle_s,
            waits=main_thread_waits(),
            does=main_thread_does(),
        )

    def _states(self) -> list[RankState]:
        """Of all ranks that have not left, this one as it is now."""
        rows = self._rows()
        states = [self._own()]
        for rank in set(range(self._world)) - {self._rank}:
            row, age = rows.get(rank, (_unheard(rank), time.monotonic() - self._started))
            state = row.get(_STATE)
            if isinstance(state, dict):
                states.append(RankState(**{**state, "silent_s": age}))
        return sorted(states, key=lambda state: state.rank)

    def _row(self) -> Row:
        return {_STATE: asdict(self._own())}

    def _rows(self) -> dict[int, tuple[Row, float]]:
        return self._board.rows() if self._board else {}

    def _find(self) -> Failure | None:
        """What another rank has found, or this one finds."""
        declared = self._declared()
        if declared is not None:
            return declared
        states = self._states()
        if self._meeting is not None and self._board is not None and self._board.age_s > self._answers_within_s:
            (own,) = (state for state in states if state.rank == self._rank)
            server = next((state for state in states if state.rank == 0), None)
            server = server if self._meeting.rank_zero_serves else None
            stall = store_lost(own, server, self._meeting.address, timeout_s=self._timeout_s)
        else:
            stall = find_stall(states, timeout_s=self._timeout_s, answers_within_s=self._answers_within_s)
        if stall is None:
            return None
        return Failure(time=time.time(), rank=stall.culprit.rank, type=STALLED, message=stall.message)

    def _declared(self) -> Failure | None:
        """The verdict of the first rank that has one, so that all say the same."""
        for _, (row, _age) in sorted(self._rows().items()):
            verdict = row.get(_VERDICT)
            if isinstance(verdict, dict):
                return Failure(**verdict)
        return None

    def _end(self, cause: Failure) -> None:
        """Write everything down, wait until the others have done so too, and end the process."""
        overview = table(self._states(), self._answers_within_s) + "\n"
        print(f"rank {self._rank}\n{overview}\n{all_stacks()}", file=self._file, flush=True)
        deadline = time.monotonic() + 2 * self._interval_s + _MIN_ANSWER_S
        while self._board is not None and time.monotonic() < deadline and not self._all_end():
            self._board.post({**self._row(), _VERDICT: asdict(cause)})
            self._board.refresh()
            time.sleep(_CLOSING_S)
        if self._meeting is not None and self._meeting.rank_zero_serves and self._rank == 0:
            time.sleep(_MIN_ANSWER_S)  # the others are still reading what this process serves
        end_run(replace(self._declared() or cause, traceback=overview))

    def _all_end(self) -> bool:
        """Whether every rank that answers has written its stacks."""
        answering = [row for row, age in self._rows().values() if age <= self._answers_within_s and _LEFT not in row]
        return all(_VERDICT in row for row in answering)


def _unheard(rank: int) -> Row:
    """What stands for a rank that has said nothing yet."""
    state = RankState(
        rank=rank, host="an unknown host", pid=0, phase=pulse.STARTING, step=0, entered=0, idle_s=0.0, waits=False,
        does="an unknown line",
    )  # fmt: skip
    return {_STATE: asdict(state)}
