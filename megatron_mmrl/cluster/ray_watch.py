"""One attempt at a run on a Ray cluster, from its first process to its end. Knows nodes, not how they are reached."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_mmrl.cluster.failure import first_cause, read_failures
from megatron_mmrl.cluster.ray_child import Report
from megatron_mmrl.cluster.stop import EXIT_REQUEUE, REQUEST
from megatron_mmrl.cluster.torchrun import Requests

_LOOK_EVERY_S = 0.2
_SETTLE_S = 5.0  # after a bad end: time for the other nodes to end and to write down why
_END_S = 6.0  # for a node to end its processes when it is told to
_GOOD = (None, 0, EXIT_REQUEUE)


class LostNodeError(Exception):
    """A node, or our actor there, is gone; the message names it."""


class Node(Protocol):
    """A process on a node of the cluster."""

    def signal(self, number: int) -> None:
        """Send it a signal; returns at once, also when the node is lost."""
        ...


# Asks all at once. Per node what has become of its process, None if there is no answer yet, or why it is lost.
Poll = Callable[[], Sequence[Report | LostNodeError | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How an attempt ended: the exit code, the last line for the user (empty when all is well)."""

    code: int
    message: str = ""

    @property
    def may_start_again(self) -> bool:
        """Not after a good end, an interrupt, or a configuration that would be refused again."""
        return self.code == 1


def interrupted(number: int) -> End:
    """By a signal."""
    return End(code=128 + number, message=f"interrupted ({signal.Signals(number).name})")


class Watch:
    """Follows the nodes of one attempt.

    Args:
        nodes: one for each node of the job, in their order.
        poll: asks them.
        requests: what signals ask of this process.
        log_dir: where the ranks leave records of their ends.
    """

    def __init__(self, nodes: Sequence[Node], poll: Poll, requests: Requests, log_dir: Path) -> None:
        self._nodes, self._poll, self._requests, self._log_dir = nodes, poll, requests, log_dir
        self._last: list[Report | LostNodeError | None] = [None] * len(nodes)

    def until_end(self) -> End:
        """Pass on requests to stop and node 0's output until all nodes have ended, or one badly; then end the rest."""
        told_to_stop = False
        settled_at: float | None = None
        while True:
            if self._requests.to_end is not None:
                number = self._requests.to_end
                self._end_all()
                return interrupted(number)
            if self._requests.to_stop and not told_to_stop:
                told_to_stop = True
                print("asked to stop: saving at the end of this step; a second signal ends the run", file=sys.stderr)
                for node in self._nodes:
                    node.signal(REQUEST)
            silent = self._look()
            if not any(map(_may_run, self._last)):
                return self._verdict()
            if settled_at is None and not all(map(_is_well, self._last)):
                settled_at = time.monotonic() + _SETTLE_S
            if settled_at is not None and time.monotonic() > settled_at and not silent:
                self._end_all()
                return self._verdict()
            time.sleep(_LOOK_EVERY_S)

    def _look(self) -> bool:
        """Ask all nodes; whether one gives no answer, and so may be lost."""
        silent = False
        for index, answer in enumerate(self._poll()):
            if answer is None:
                silent = True
                continue
            self._last[index] = answer
            if index == 0 and isinstance(answer, Report) and answer.output:
                sys.stdout.buffer.write(answer.output)
                sys.stdout.flush()
        return silent

    def _end_all(self) -> None:
        for node, last in zip(self._nodes, self._last, strict=True):
            if _may_run(last):
                node.signal(signal.SIGINT)
        deadline = time.monotonic() + _END_S
        while any(map(_may_run, self._last)) and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            self._look()

    def _verdict(self) -> End:
        reports = [last for last in self._last if isinstance(last, Report)]
        lost = [last for last in self._last if isinstance(last, LostNodeError)]
        if lost:  # what the others' ranks say is that they miss it
            return End(code=1, message=f"error: {lost[0]}")
        if all(_is_well(report) for report in reports):
            return End(code=EXIT_REQUEUE if any(report.code == EXIT_REQUEUE for report in reports) else 0)
        failures = read_failures(self._log_dir)
        if failures:
            cause = first_cause(failures)
            return End(code=cause.exit_code, message=cause.report)
        bad = next(index for index, last in enumerate(self._last) if not _is_well(last))
        report = self._last[bad]
        assert isinstance(report, Report)
        said = report.last_error.removeprefix("error: ") or f"ended with code {report.code}"
        return End(code=2 if report.code == 2 else 1, message=f"error: node {bad}: {said}")


def _may_run(last: Report | LostNodeError | None) -> bool:
    return last is None or (isinstance(last, Report) and last.code is None)


def _is_well(last: Report | LostNodeError | None) -> bool:
    return last is None or (isinstance(last, Report) and last.code in _GOOD)
