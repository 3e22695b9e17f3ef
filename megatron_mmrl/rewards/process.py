"""The parent's end of one scoring process: a link that never blocks and a deadline for the job at hand.

The process is a child at the end of two pipes, or on another node at the end of a connection (``remote.py``).
"""

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

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


class WorkerLostError(Exception):
    """There is no worker any more, and nothing says that a job is to blame: another can be asked the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a worker ended: its exit code (negative for a signal) and the processor time that it had used."""

    code: int
    cpu_s: float


class Link(Protocol):
    """A worker's process as seen from here. Neither file blocks."""

    input: int  # file descriptors
    output: int

    @property
    def pid(self) -> int | None:
        """None: not on this machine."""
        ...

    def read(self) -> bytes:
        """What the worker wrote, at least a byte; b"" once it never will again. Raises BlockingIOError until then."""
        ...

    def is_running(self) -> bool:
        """Whether the worker could answer, as far as is known without waiting."""
        ...

    def end(self, *, closed: bool) -> Ending:
        """End the worker and all that it started; to be called once.

        Args:
            closed: it closed its end of the link, and so it may be ending by itself.

        Raises:
            WorkerLostError: nobody is left to say how it ended.
        """
        ...


class Pipes:
    """A worker started by this process."""

    def __init__(self) -> None:
        self._process = start_worker(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.input, self.output = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self.input, self.output):
            os.set_blocking(pipe, False)

    def read(self) -> bytes:
        return os.read(self.output, _READ_BYTES)

    def is_running(self) -> bool:
        return is_running(self.pid)

    def end(self, *, closed: bool) -> Ending:
        ending = end_worker(self._process, patience_s=EXIT_LIMIT_S if closed else 0.0)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return ending


def start_worker(stdin: int, stdout: int) -> subprocess.Popen[bytes]:
    """Start ``worker.py``, which dies with the calling thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_mmrl.rewards.worker", str(os.getpid())],
        stdin=stdin,
        stdout=stdout,
        bufsize=0,
        process_group=0,  # killed with whatever a user's reward starts; Ctrl-C goes to the parent alone
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )


def is_running(pid: int) -> bool:
    """Asked without collecting the exit code: until ``end_worker`` does, the process id is nobody else's."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end_worker(process: subprocess.Popen[bytes], *, patience_s: float) -> Ending:
    """Kill a worker and all of its process group; one that ends by itself within ``patience_s`` says its code."""
    cpu_s = _cpu_seconds(process.pid)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and is_running(process.pid):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return Ending(code=process.wait(), cpu_s=cpu_s)


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process so far; Linux makes the clock's number out of the process's."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid(3) does
    except OSError:
        return 0.0  # it has ended


class WorkerProcess:
    """A running ``worker.py``. Jobs are sent in batches, answered in order, and timed one by one.

    Args:
        spec: what it computes.
        connect: starts the process, or finds one. Raises WorkerLostError where there is none any more.
    """

    def __init__(self, spec: WorkerSpec, connect: Callable[[], Link] = Pipes) -> None:
        self.connect = connect
        self.link = connect()
        self.ready = False
        self.ended = False  # it closed its end of the link
        self.jobs: deque[Job] = deque()  # sent and not answered; the first is the one being worked on
        self.deadline = time.monotonic() + START_LIMIT_S
        self._timeout_s, self._cpu_s = spec.timeout_s, 0.0
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._queue(asdict(spec))

    @property
    def unsent(self) -> bool:
        """Whether ``flush`` still has something to write."""
        return bool(self._outgoing) and not self.ended

    @property
    def overdue(self) -> bool:
        """Whether the job at hand, or the start, has taken longer than it may. Ask after ``receive``."""
        return time.monotonic() >= self.deadline

    def assign(self, jobs: Iterable[Job]) -> None:
        """Send jobs to a worker that has none; the clock of the first starts now."""
        for job in jobs:
            self.jobs.append(job)
            self._queue({"id": job.index, **job.question})
        self.deadline = time.monotonic() + self._timeout_s
        self.flush()

    def flush(self) -> None:
        """Write what the link takes now."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self.link.input, self._outgoing)]
        except BlockingIOError:
            return  # it is full; the worker reads on when it gets there
        except (BrokenPipeError, ConnectionResetError):
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
            self._cpu_s = message["cpu_s"]
            if "refused" in message:
                raise ValueError(message["refused"])
            if "id" in message:
                reply = Reply(value=message.get("value"), extras=message.get("extras"), error=message.get("error"))
                answers.append((self._answered(message["id"]), reply))
            else:
                self.ready = True
        if lines:
            self.deadline = time.monotonic() + self._timeout_s if self.jobs else math.inf
        return answers

    def end(self) -> tuple[Ending, bool]:
        """End the process. How it ended, and whether it spent half of the time limit computing on the job at hand.

        Raises:
            WorkerLostError: it is out of reach.
        """
        ending = self.link.end(closed=self.ended)
        return ending, ending.cpu_s - self._cpu_s >= self._timeout_s / 2

    def _queue(self, message: Mapping[str, object]) -> None:
        self._outgoing += json.dumps(message).encode() + b"\n"

    def _answered(self, index: int) -> int:
        expected = self.jobs.popleft().index
        if index != expected:
            raise RuntimeError(f"reward worker answered job {index} while job {expected} was due")
        return index

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self.link.read():
                self._incoming += data
            self.ended = True
