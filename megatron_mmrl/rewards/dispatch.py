"""Spreads jobs over worker processes and replaces those that hang or die, on a thread of its own.

A hang costs its own job and nothing else: the worker is killed, the rest of its batch goes to another. The thread keeps
time limits while whoever asked does something else, such as waiting for an engine.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack

from megatron_mmrl import pulse
from megatron_mmrl.rewards.process import Job, Link, Pipes, Reply, WorkerLostError, WorkerProcess, WorkerSpec

_MAX_BATCH = 64  # jobs sent to a worker at once
_MAX_FAILED_STARTS = 3  # in a row, once workers have been seen to start
Question = Mapping[str, object]


class Dispatcher:
    """``num_workers`` processes of its own, ready when the constructor returns. May be used by any thread.

    Linux ends a worker when the thread that started it ends; here that is the dispatcher's own.

    Args:
        spec: what the workers compute.
        num_workers: how many to start here.
        remote: of each worker elsewhere, what connects to it. They are used as long as they can be reached.

    Raises:
        ValueError: a worker refused the terms.
        RuntimeError: a worker did not start.
    """

    def __init__(self, spec: WorkerSpec, num_workers: int, remote: Sequence[Callable[[], Link]] = ()) -> None:
        self._spec = spec
        self._workers: list[WorkerProcess] = []
        self._gone: set[Callable[[], Link]] = set()  # there is no use in trying again
        self._waiting: deque[Job] = deque()
        self._futures: dict[int, Future[Reply]] = {}  # of jobs without a reply, by index
        self._num_jobs = 0
        self._lock = threading.Lock()  # of the three that any thread may touch:
        self._asked: deque[tuple[Question, Future[Reply]]] = deque()  # not yet seen by our thread
        self._bell: tuple[int, int] | None = os.pipe()  # wakes our thread up; None once it has ended
        self._closing, self._reason = False, "nothing is scored any more"
        self._is_up, self._failed_starts = False, 0  # failures since a worker was last ready
        os.set_blocking(self._bell[1], False)
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=([Pipes] * num_workers + [*remote], ready), name="reward-dispatch", daemon=True
        )
        self._thread.start()
        with ExitStack() as on_error:
            on_error.callback(self.close)
            ready.result()
            on_error.pop_all()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers now at work on this machine."""
        return [worker.link.pid for worker in self._workers if worker.link.pid is not None]

    def submit(self, questions: Sequence[Question]) -> list[Future[Reply]]:
        """Have questions answered; returns at once, a future for each.

        Raises:
            RuntimeError: the dispatcher has ended.
        """
        futures: list[Future[Reply]] = [Future() for _ in questions]
        with self._lock:
            if self._closing or self._bell is None:
                raise RuntimeError(f"the worker processes are closed: {self._reason}")
            if questions and not self._asked:  # else it was rung, and they are not seen yet
                self._ring()
            self._asked.extend(zip(questions, futures, strict=True))
        return futures

    def close(self) -> None:
        """End the workers; what was asked and has no reply fails. Safe to call twice."""
        with self._lock:
            self._closing = True
            self._ring()
        self._thread.join()

    def _ring(self) -> None:
        if self._bell is not None:
            with contextlib.suppress(BlockingIOError):  # it was rung often enough
                os.write(self._bell[1], b"!")

    def _serve(self, links: Sequence[Callable[[], Link]], ready: Future[None]) -> None:
        """The thread: start workers, hand out jobs and collect replies until told to end."""
        with ExitStack() as stack:
            stack.callback(self._end, ready)
            try:
                for connect in links:
                    self._start(connect)
                while not all(worker.ready for worker in self._workers):
                    self._turn()
                ready.set_result(None)
                self._is_up = True
                while not self._closing:
                    self._accept()
                    self._assign()
                    self._turn()
            except (ValueError, RuntimeError, OSError) as error:
                self._reason = str(error)
                if not ready.done():
                    ready.set_exception(error)

    def _end(self, ready: Future[None]) -> None:
        while self._workers:
            with contextlib.suppress(WorkerLostError):
                self._workers.pop().end()
        with self._lock:
            left = [*self._futures.values(), *(future for _, future in self._asked)]
            if self._bell is not None:
                for end in self._bell:
                    os.close(end)
                self._bell = None
        closed = RuntimeError(f"the worker processes are closed: {self._reason}")
        for future in left:
            future.set_exception(closed)
        if not ready.done():
            ready.set_exception(closed)

    def _start(self, connect: Callable[[], Link]) -> None:
        if connect in self._gone:
            return
        try:
            self._workers.append(WorkerProcess(self._spec, connect))
        except WorkerLostError as error:
            _tell_lost(error)
            self._gone.add(connect)

    def _accept(self) -> None:
        with self._lock:
            asked = list(self._asked)
            self._asked.clear()
        for question, future in asked:
            self._futures[self._num_jobs] = future
            self._waiting.append(Job(index=self._num_jobs, question=question))
            self._num_jobs += 1

    def _assign(self) -> None:
        batch = min(_MAX_BATCH, math.ceil(len(self._waiting) / (4 * len(self._workers))))
        for worker in list(self._workers):
            if not worker.jobs and not worker.link.is_running():  # ended while it was idle: nothing is lost
                self._workers.remove(worker)
                worker.end()
                self._start(worker.connect)
            elif worker.ready and not worker.jobs and self._waiting:
                worker.assign([self._waiting.popleft() for _ in range(min(batch, len(self._waiting)))])

    def _turn(self) -> None:
        """Wait for the next answer, question or deadline; collect answers, replace workers that are late or gone."""
        self._wait()
        for worker in list(self._workers):
            worker.flush()
            for index, reply in worker.receive():
                pulse.beat()
                self._futures.pop(index).set_result(reply)
            if worker.ended or worker.overdue:
                self._replace(worker)

    def _wait(self) -> None:
        deadline = min(worker.deadline for worker in self._workers)
        assert self._bell is not None
        poll = select.poll()
        poll.register(self._bell[0], select.POLLIN)
        for worker in self._workers:
            poll.register(worker.link.output, select.POLLIN)
            if worker.unsent:
                poll.register(worker.link.input, select.POLLOUT)
        wait_ms = None if deadline == math.inf else math.ceil(max(0.0, deadline - time.monotonic()) * 1000)
        if any(fd == self._bell[0] for fd, _ in poll.poll(wait_ms)):
            os.read(self._bell[0], 1 << 12)

    def _replace(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        try:
            ending, was_busy = worker.end()
        except WorkerLostError as lost:
            _tell_lost(lost)
            self._waiting.extendleft(reversed(worker.jobs))
            return
        self._failed_starts = 0 if worker.ready else self._failed_starts + 1
        if self._failed_starts > (_MAX_FAILED_STARTS if self._is_up else 0):
            what = f"ended with code {ending.code}" if worker.ended else "was not ready in time"
            raise RuntimeError(f"a reward worker {what} while starting; what it printed says why")
        if worker.jobs:
            index = worker.jobs.popleft().index
            late = f"scoring took longer than the limit of {self._spec.timeout_s:g} s"
            error = f"scoring ended the worker, code {ending.code}" if worker.ended else late
            reply = Reply(error=error, timed_out=not worker.ended, was_busy=was_busy and not worker.ended)
            self._futures.pop(index).set_result(reply)
            self._waiting.extendleft(reversed(worker.jobs))
        self._start(worker.connect)


def _tell_lost(error: WorkerLostError) -> None:
    print(f"a reward worker is lost, others do its work: {error}", file=sys.stderr)
