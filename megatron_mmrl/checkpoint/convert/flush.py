"""Files whose data goes to the disk, and out of memory, while more is being written.

A large file that is synced at its end has filled the page cache by then, and the disk was idle meanwhile. Flushed as it
grows, it needs few pages, and ``--verify`` reads what is on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

FLUSH_BYTES = 16 << 20


class Flusher:
    """Flushes an open file in another thread, a stretch at a time."""

    def __init__(self, stream: BinaryIO, pool: ThreadPoolExecutor) -> None:
        self._stream, self._pool = stream, pool
        self._begun, self._job = 0, Future[None]()
        self._job.set_result(None)

    def step(self) -> None:
        """Call after each write. Raises OSError when an earlier stretch could not be flushed."""
        end = self._stream.tell()
        if end - self._begun >= FLUSH_BYTES and self._job.done():
            self._job.result()
            self._job = self._pool.submit(_flush, self._stream.fileno(), self._begun, end)
            self._begun = end

    def wait(self) -> None:
        """Until nothing is being flushed. Raises OSError as ``step`` does."""
        self._job.result()


@contextmanager
def flushed_file(file: Path) -> Iterator[tuple[BinaryIO, Flusher]]:
    """A new file and its flusher; on leaving, what was written last may still be in memory only."""
    with ThreadPoolExecutor(max_workers=1) as pool, file.open("xb") as stream:
        flusher = Flusher(stream, pool)
        yield stream, flusher
        flusher.wait()


def _flush(descriptor: int, begin: int, end: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
