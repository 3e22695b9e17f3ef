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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO

START_LIMIT_S = 120.0  # imports only, but possibly on a machine where everything starts at once
EXIT_LIMIT_S = 5.0
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker computes and what it may use."""

    terms: Sequence[tuple[str, str, Mapping[str, object]]]  # (key in the scores, name, kwargs)
    timeout_s: float
    max_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One question to a worker; ``index`` is the asker's."""

    index: int
    question: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer: a value, or why there is none."""

    value: Mapping[str, float] | bool | None = None
    extras: Mapping[str, float] | None = None
    error: str | None = None
    timed_out: bool = False
    was_busy: bool = False  # it timed out computing, not waiting: it would do so again


class WorkerProcess:
    """A running ``worker.py``. Jobs are sent in batches, answered in order, and timed one by one."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.ready = False
        self.ended = False  # it closed its end of the pipe
        self.jobs: deque[Job] = deque()  # sent and not answered; the first is the one being worked on
        self.deadline = time.monotonic() + START_LIMIT_S
        self._timeout_s, self._cpu_s = spec.timeout_s, 0.0
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
        self._queue(asdict(spec))

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
        self._start_clock()
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
                reply = Reply(value=message.get("value"), extras=message.get("extras"), error=message.get("error"))
                answers.append((self._answered(message["id"]), reply))
            else:
                self.ready = True
        if lines and self.jobs:
            self._start_clock()
        elif lines:
            self.deadline = math.inf
        return answers

    def was_busy(self) -> bool:
        """Whether it spent at least half of the time limit computing on the job at hand. Ask before ``kill``."""
        return self._cpu_seconds() - self._cpu_s >= self._timeout_s / 2

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

    def _start_clock(self) -> None:
        self.deadline = time.monotonic() + self._timeout_s
        self._cpu_s = self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        """Processor time of the process so far; Linux makes the clock's number out of the process's."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)  # as clock_getcpuclockid(3) does
        except OSError:
            return 0.0  # it has ended

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
