"""Spreads jobs over worker processes and replaces those that hang or die.

A hang costs its own job and nothing else: the worker is killed, the rest of its batch goes to another.
"""

from __future__ import annotations

import math
import selectors
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from megatron_mmrl.rewards.process import Job, Reply, WorkerProcess

_MAX_BATCH = 64  # jobs sent to a worker at once


class Dispatcher:
    """``num_workers`` processes, ready when the constructor returns.

    Raises:
        ValueError: a worker refused the terms.
        RuntimeError: a worker did not start.
    """

    def __init__(self, terms: Sequence[tuple[str, Mapping[str, object]]], timeout_s: float, num_workers: int) -> None:
        self._terms, self._timeout_s = terms, timeout_s
        self._workers: list[WorkerProcess] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self._workers += [self._start() for _ in range(num_workers)]
            while not all(worker.ready for worker in self._workers):
                self._turn(deque(), {})
            on_error.pop_all()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers now at work."""
        return [worker.pid for worker in self._workers]

    def run(self, questions: Sequence[Mapping[str, object]]) -> list[Reply]:
        """A reply to each question, in order. Whatever interrupts it closes the dispatcher."""
        if not self._workers:
            raise RuntimeError("the worker processes are closed")
        waiting = deque(Job(index=index, question=question) for index, question in enumerate(questions))
        batch = min(_MAX_BATCH, math.ceil(len(questions) / (4 * len(self._workers))))
        replies: dict[int, Reply] = {}
        with ExitStack() as on_error:
            on_error.callback(self.close)  # interrupted half-way, workers would answer what nobody asks any more
            while len(replies) < len(questions):
                self._assign(waiting, batch)
                self._turn(waiting, replies)
            on_error.pop_all()
        return [replies[index] for index in range(len(questions))]

    def close(self) -> None:
        """End the workers; safe to call twice."""
        while self._workers:
            self._workers.pop().kill()

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._terms, self._timeout_s)

    def _assign(self, waiting: deque[Job], batch: int) -> None:
        for slot, worker in enumerate(self._workers):
            if not worker.is_running() and not worker.jobs:  # ended while it was idle: nothing is lost
                worker.kill()
                self._workers[slot] = self._start()
            elif worker.ready and not worker.jobs and waiting:
                worker.assign([waiting.popleft() for _ in range(min(batch, len(waiting)))])

    def _turn(self, waiting: deque[Job], replies: dict[int, Reply]) -> None:
        """Wait for the next answer or deadline, collect answers, replace workers that are late or gone."""
        self._wait()
        for slot, worker in enumerate(self._workers):
            worker.flush()
            replies.update(worker.receive())
            if worker.ended or worker.overdue:
                self._workers[slot] = self._replace(worker, waiting, replies)

    def _wait(self) -> None:
        deadline = min(worker.deadline for worker in self._workers)
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.output, selectors.EVENT_READ)
                if worker.unsent:
                    selector.register(worker.input, selectors.EVENT_WRITE)
            selector.select(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))

    def _replace(self, worker: WorkerProcess, waiting: deque[Job], replies: dict[int, Reply]) -> WorkerProcess:
        ended, code = worker.ended, worker.kill()
        if not worker.ready:
            what = f"ended with code {code}" if ended else "was not ready in time"
            raise RuntimeError(f"a reward worker {what} while starting; what it printed says why")
        if worker.jobs:
            index = worker.jobs.popleft().index
            late = f"scoring took longer than the limit of {self._timeout_s:g} s"
            replies[index] = Reply(
                error=f"scoring ended the worker, code {code}" if ended else late, timed_out=not ended
            )
            waiting.extendleft(reversed(worker.jobs))
        return self._start()
