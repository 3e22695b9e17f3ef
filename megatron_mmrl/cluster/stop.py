"""Asked to stop, a run ends its step, saves, and leaves with a code that lets a scheduler start it again.

A launcher asks each rank with SIGUSR1. It starts them with that signal blocked, which processes inherit: a request
that comes before a rank listens waits for it, and whatever a rank starts (engines, workers) never hears of it. Slurm,
asked to signal a task, signals every process below it as well, and SIGUSR1 ends those that know nothing of it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_REQUEUE = 85  # saved, not finished: start it again with run.resume=auto
REQUEST = signal.SIGUSR1
ASKING = (signal.SIGUSR1, signal.SIGTERM)  # what schedulers and users send to a launcher for it


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self, *, to_sigterm: bool) -> None:
        """From now on note requests, also the one that came before.

        To be called from the main thread before any other is started: all are to keep SIGUSR1 blocked.

        Args:
            to_sigterm: take SIGTERM for a request as well. For ranks whose launcher knows nothing of SIGUSR1
                (torchrun's own agent sends SIGTERM, and SIGKILL 30 s later unless told otherwise).
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {REQUEST})
        threading.Thread(target=self._wait, name="stop-request", daemon=True).start()
        if to_sigterm:
            signal.signal(signal.SIGTERM, self._note)

    def _wait(self) -> None:
        while True:
            signal.sigwait({REQUEST})
            self._note()

    def _note(self, *_: object) -> None:
        self.asked = True


@contextmanager
def requests_held() -> Iterator[None]:
    """Processes started in this block keep a request until they listen for it; so does this one, until the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {REQUEST})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {REQUEST})


def ask(pid: int) -> None:
    """Ask one rank to stop."""
    os.kill(pid, REQUEST)
