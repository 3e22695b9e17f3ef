"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mmrl.checkpoint.manifest import fsync
from megatron_mmrl.config.checks import require

_SPARE_BYTES = 64 << 20  # for what is not counted: metadata, the file system's own


@contextmanager
def new_directory(target: Path, need_bytes: int) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` that takes its place at the end, or is removed after any failure.

    SIGTERM ends the process as Ctrl-C does: the directory is removed first.

    Args:
        target: must not exist.
        need_bytes: how much will be written.

    Raises:
        ValueError: ``target`` exists, its parent is no directory, or the disk has too little room.
    """
    check_target(target)
    free = shutil.disk_usage(target.parent).free
    require(
        free >= need_bytes + _SPARE_BYTES,
        f"{target} needs {need_bytes + _SPARE_BYTES:,} bytes, but {target.parent} has {free:,} free; make room or "
        "write elsewhere",
    )
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with _sigterm_raises():
            draft.chmod(0o777 & ~_umask())
            yield draft
            with writing("the last of the data", target):
                for path in (*draft.rglob("*"), draft):
                    fsync(path)
            check_target(target)
            os.rename(draft, target)
            fsync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # not there any more when all went well


def check_target(target: Path) -> None:
    """Refuse to write over anything. Raises ValueError."""
    require(not target.exists() and not target.is_symlink(), f"{target} exists; name a new directory")
    require(target.parent.is_dir(), f"{target.parent} is not a directory; make it first")


@contextmanager
def writing(what: str, file: Path) -> Iterator[None]:
    """Errors of the file system, such as a full disk, name what was being written. Raises ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what} cannot be written to {file}: {error}") from error


def _umask() -> int:
    """What a new directory would get; ``mkdtemp`` gives nobody else any right."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)
