"""A directory that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_directory(target: Path, *, replaces: Sequence[str] = (), overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``target``; when the block ends well it becomes ``target``, else it is removed.

    Args:
        target: must not exist, or be empty.
        replaces: with ``overwrite``, files that an existing ``target`` may have and lose.

    Raises:
        ValueError: ``target`` is a file, or has files that may not be replaced.
    """
    _check(target, set(replaces) if overwrite else set(), overwrite)
    beside = next(parent for parent in target.absolute().parents if parent.is_dir())
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=beside))
    try:
        yield staged
        staged.chmod(0o777 & ~_umask())
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and any(target.iterdir()):
            _exchange(staged, target)
        else:
            os.replace(staged, target)
    finally:
        with _undisturbed():
            shutil.rmtree(staged, ignore_errors=True)


def _check(target: Path, may_go: set[str], overwrite: bool) -> None:
    nearest = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} exists and is not a directory")
    others = sorted({file.name for file in target.iterdir()} - may_go) if target.is_dir() else []
    if others:
        way = "give another" if overwrite else "give another, or replace what was prepared there with --overwrite"
        raise ValueError(f"{target} exists and holds {', '.join(others[:5])}; {way}")


def _exchange(staged: Path, target: Path) -> None:
    """Put ``staged`` in the place of a directory that holds files; those end in ``staged``."""
    old = staged.with_suffix(".replaced")
    with _undisturbed():
        os.replace(target, old)
        try:
            os.replace(staged, target)
        except OSError:
            os.replace(old, target)
            raise
        os.replace(old, staged)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until a few renames or a removal are done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
