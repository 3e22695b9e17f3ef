"""The parent's end of one scoring process: two pipes that never block and a deadline for the job at hand."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO

START_LIMIT_S = 120.0  # imports only, but possibly on a machine where everything starts at once
EXIT_LIMIT_S = 5.0
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One question to a worker; ``index`` is the asker's."""

    index: int
    question: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer: a value, or why there is none."""

    value: Mapping[str, float] | bool | None = None
    error: str | None = None
    timed_out: bool = False


class WorkerProcess:
    """A running ``worker.py``. Jobs are sent in batches, answered in order, and timed one by one."""

    def __init__(self, terms: Iterable[tuple[str, Mapping[str, object]]], timeout_s: float) -> None:
        self.ready = False
        self.ended = False  # it closed its end of the pipe
        self.jobs: deque[Job] = deque()  # sent and not answered; the first is the one being worked on
        self.deadline = time.monotonic() + START_LIMIT_S
        self._timeout_s = timeout_s
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_mmrl.rewards.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # killed with whatever a user's reward starts; Ctrl-C goes to the parent alone
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        for pipe in (self.input, self.output):
            os.set_blocking(pipe.fileno(), False)
        self._queue({"terms": list(terms), "timeout_s": timeout_s})

    @property
    def input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def unsent(self) -> bool:
        """Whether ``flush`` still has something to write."""
        return bool(self._outgoing) and not self.ended

    @property
    def overdue(self) -> bool:
        """Whether the job at hand, or the start, has taken longer than it may. Ask after ``receive``."""
        return time.monotonic() >= self.deadline

    def is_running(self) -> bool:
        """Asked without collecting the exit code: until ``kill`` does, the process id is nobody else's."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def assign(self, jobs: Iterable[Job]) -> None:
        """Send jobs to a worker that has none; the clock of the first starts now."""
        for job in jobs:
            self.jobs.append(job)
            self._queue({"id": job.index, **job.question})
        self.deadline = time.monotonic() + self._timeout_s
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes now."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self.input.fileno(), self._outgoing)]
        except BlockingIOError:
            return  # the pipe is full; the worker reads on when it gets there
        except BrokenPipeError:
            self._outgoing.clear()  # it is gone, as ``receive`` will see

    def receive(self) -> list[tuple[int, Reply]]:
        """(index, reply) of the jobs answered since the last call; each answer restarts the clock.

        Raises:
            ValueError: the worker refused its specification (an unknown reward, a module that is not there).
        """
        self._read()
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming = bytearray(rest)
        answers = []
        for message in map(json.loads, lines):
            if "refused" in message:
                raise ValueError(message["refused"])
            if "id" in message:
                answers.append(
                    (self._answered(message["id"]), Reply(value=message.get("value"), error=message.get("error")))
                )
            else:
                self.ready = True
            self.deadline = time.monotonic() + self._timeout_s if self.jobs else math.inf
        return answers

    def kill(self) -> int:
        """End the process and all of its process group; its exit code, negative for a signal. Safe to call twice."""
        if self._process.returncode is not None:
            return self._process.returncode
        patience = time.monotonic() + (EXIT_LIMIT_S if self.ended else 0.0)  # let one that ends by itself say its code
        while time.monotonic() < patience and self.is_running():
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self.input.close()
        self.output.close()
        return code

    def _queue(self, message: Mapping[str, object]) -> None:
        self._outgoing += json.dumps(message).encode() + b"\n"

    def _answered(self, index: int) -> int:
        expected = self.jobs.popleft().index
        if index != expected:
            raise RuntimeError(f"reward worker answered job {index} while job {expected} was due")
        return index

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.output.fileno(), _READ_BYTES):
                self._incoming += data
            self.ended = True
