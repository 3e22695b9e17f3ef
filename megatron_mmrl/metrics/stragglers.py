"""Which rank is slow in which phase.

Ranks meet in collectives, so all of them take about as long over a phase: the slow one computes, the others wait for
it. What tells them apart is the time of a phase less the time spent waiting for others. A thread looks ``RATE_HZ``
times a second whether the main thread waits (``pulse.awaits_others``); the alternative, a clock around every
collective, would have to be put around Megatron's as well, by patching torch. What looking cannot see is work that a
device does later: on a GPU a rank waits for NCCL wherever it first needs a number, and that counts as busy.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from megatron_mmrl import pulse

RATE_HZ = 20.0
RESOLUTION_S = 1 / RATE_HZ
_LATE = 4  # a look that is so many periods late was kept from looking by the main thread, which was busy then


class WaitingClock:
    """Seconds that the main thread of this process waits for other ranks, by the phases that it is in."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="straggler-clock", daemon=True)
        self._thread.start()

    def flush(self) -> dict[str, float]:
        """Seconds by phase since the last call; a phase without waiting may be missing."""
        with self._lock:
            seconds = dict(self._seconds)
            self._seconds.clear()
        return seconds

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(RESOLUTION_S):
            phases, waits = pulse.phases(), pulse.awaits_others(pulse.main_frame())
            now = time.perf_counter()
            elapsed, last = now - last, now
            if waits and elapsed < _LATE * RESOLUTION_S:
                with self._lock:
                    for phase in phases:
                        self._seconds[phase] += elapsed


def busy_seconds(phase_s: Mapping[str, float], waiting_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase that were not spent waiting."""
    return {phase: max(0.0, seconds - waiting_s.get(phase, 0.0)) for phase, seconds in phase_s.items()}


def straggler_row(busy_s: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each phase of all ranks: the slowest ``rank``, its ``busy_s``, and their ``ratio`` to the (lower) median.

    Durations below ``RESOLUTION_S`` count as that long in the ratio: they cannot be told apart.

    Args:
        busy_s: of each rank, by phase.
    """
    row: dict[str, float] = {}
    for phase in busy_s[0] if len(busy_s) > 1 else ():
        seconds = [each.get(phase, 0.0) for each in busy_s]
        slowest = max(seconds)
        row[f"straggler/{phase}/rank"] = float(seconds.index(slowest))
        row[f"straggler/{phase}/busy_s"] = slowest
        row[f"straggler/{phase}/ratio"] = max(slowest, RESOLUTION_S) / max(statistics.median_low(seconds), RESOLUTION_S)
    return row
