"""What this process is doing and when it last got on, for those who watch it.

A process has one pulse as it has one log, so this is module state: the main thread enters phases, and any thread that
sees work being done (an answer, a score, a micro-batch) beats. A beat costs less than a microsecond. Nothing here loads
anything heavy.
"""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType

STARTING = "starting"
# Where waiting for other ranks happens: inside torch.distributed, or at a ``handle.wait()`` of Megatron's or ours.
_COLLECTIVE = ("/torch/distributed/",)
_HOLDS_HANDLES = ("/torch/", "/megatron/", "/megatron_mmrl/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How far a process is."""

    phase: str  # the innermost one
    step: int
    entered: int  # phases entered so far; ranks of one run enter the same ones
    idle_s: float  # since anything was done; a wait that limits itself counts as work until its limit


class _State:
    def __init__(self) -> None:
        self.phases: tuple[str, ...] = ()
        self.step = 0
        self.entered = 0
        self.last = time.monotonic()
        self.allowed_s = 0.0


_state = _State()


def beat() -> None:
    """Something was done; from any thread."""
    _state.last = time.monotonic()


def at_step(step: int) -> None:
    """The phases that follow belong to this step."""
    _state.step = step
    beat()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The main thread is in phase ``name`` inside this block; phases nest."""
    outer = _state.phases
    _state.phases = (*outer, name)
    _state.entered += 1
    beat()
    try:
        yield
    finally:
        _state.phases = outer
        beat()


@contextmanager
def limited_wait(limit_s: float) -> Iterator[None]:
    """Inside this block the process waits for something that ends the wait itself after ``limit_s``: that is no stall.

    A beat inside the block begins the limit anew.
    """
    outer = _state.allowed_s
    _state.allowed_s = limit_s
    beat()
    try:
        yield
    finally:
        _state.allowed_s = outer
        beat()


def forgive(seconds: float) -> None:
    """This process was stopped for so long and could not have done anything."""
    _state.last += seconds


def mark() -> Mark:
    """How far this process is now."""
    idle = max(0.0, time.monotonic() - _state.last - _state.allowed_s)
    phases = _state.phases
    return Mark(phase=phases[-1] if phases else STARTING, step=_state.step, entered=_state.entered, idle_s=idle)


def phases() -> tuple[str, ...]:
    """The phases that the main thread is in, outermost first."""
    return _state.phases


def main_frame() -> FrameType:
    """The innermost frame of the main thread."""
    ident = threading.main_thread().ident
    assert ident is not None
    return sys._current_frames()[ident]


def awaits_others(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame is ``frame`` waits for other ranks, in a collective or for a message."""
    line = frame.f_lineno or 0  # None between two lines
    return in_collective(frame.f_code) or _at_wait(frame.f_code, line)


@cache
def in_collective(code: CodeType) -> bool:
    """Whether ``code`` is of torch.distributed."""
    return any(part in code.co_filename for part in _COLLECTIVE)


@cache
def _at_wait(code: CodeType, line: int) -> bool:
    text = linecache.getline(code.co_filename, line)
    return ".wait(" in text and any(part in code.co_filename for part in _HOLDS_HANDLES)
