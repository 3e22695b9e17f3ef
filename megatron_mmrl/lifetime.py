"""What ties processes together on Linux: no child outlives its parent, and a parent can find every descendant."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel SIGKILL this process as soon as its parent is gone, however the parent ended.

    Linux watches the *thread* that started this process: start long-lived children from a thread that lives as long
    as they should. Does not pass to this process's own children.

    Args:
        parent_pid: who started this process; when that is no longer the parent, exit now. Unset: a parent that ended
            before this call goes unnoticed.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:  # asked after the request: nothing slips in between
        sys.exit("error: the process that started this one is gone")


def adopt_orphans() -> None:
    """Make this process the new parent of any descendant whose own parent ends, so that it can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants(timeout_s: float = 5.0) -> None:
    """SIGKILL all descendants and wait until none is left, or for ``timeout_s``. Needs ``adopt_orphans`` before."""
    import psutil

    this = psutil.Process()
    deadline = time.monotonic() + timeout_s
    while (left := this.children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.2)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}, {value}): {os.strerror(errno)}")
