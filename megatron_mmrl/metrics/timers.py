"""How long each phase of a step takes; the pulse of the process learns of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_mmrl import pulse


class Timers:
    """Adds up wall-clock seconds by name until ``flush``."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds of this block to ``name``, also when it raises. Blocks may be nested and repeated."""
        start = time.perf_counter()
        try:
            with pulse.phase(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last flush."""
        return dict(self._seconds)

    def flush(self) -> dict[str, float]:
        """``{"time/<name>_s": seconds}`` since the last flush, each name that was timed."""
        row = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return row
