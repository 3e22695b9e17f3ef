"""Rows of parquet files by number. Row groups are the unit of reading; the last ones read are kept."""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_FINGERPRINT_BYTES = 4 << 20  # read at either end of a file; a file's end describes all of its columns


class ParquetRows:
    """All rows of some files, in order: ``len(rows)``, ``rows.row(i)``, ``rows.locate(i)``.

    Decoded row groups are kept up to ``cached_bytes`` (one is always kept), so shuffled reading is cheap when the
    files fit or their row groups are small. Image bytes come as they are stored.

    Raises:
        ValueError: no files, a file is missing or not parquet.
    """

    def __init__(self, files: Sequence[str], *, cached_bytes: int = 256 << 20) -> None:
        if not files:
            raise ValueError("no parquet files given")
        self._files = [_open(file) for file in files]
        self.names = file_names(files)
        self._groups = [
            (number, group) for number, file in enumerate(self._files) for group in range(file.num_row_groups)
        ]
        sizes = [self._files[number].metadata.row_group(group).num_rows for number, group in self._groups]
        self._group_ends = list(accumulate(sizes))
        self._file_starts = [0, *accumulate(file.metadata.num_rows for file in self._files)]
        self._cached: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached_bytes = cached_bytes
        self.fingerprint = _fingerprint(files)

    def __len__(self) -> int:
        return self._file_starts[-1]

    def locate(self, index: int) -> tuple[str, int]:
        """File name and row within that file of row ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect.bisect_right(self._file_starts, index) - 1
        return self.names[number], index - self._file_starts[number]

    def row(self, index: int) -> dict[str, object]:
        """One row as plain Python values. Raises ValueError, naming file and row group, where the file is damaged."""
        self.locate(index)
        group = bisect.bisect_right(self._group_ends, index)
        start = self._group_ends[group - 1] if group else 0
        return self._table(group).slice(index - start, 1).to_pylist()[0]

    def _table(self, group: int) -> pa.Table:
        if group in self._cached:
            self._cached.move_to_end(group)
            return self._cached[group]
        number, within = self._groups[group]
        try:
            table = self._files[number].read_row_group(within)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.names[number]}: row group {within} cannot be read: {error}") from error
        self._cached[group] = table
        while len(self._cached) > 1 and sum(kept.nbytes for kept in self._cached.values()) > self._cached_bytes:
            self._cached.popitem(last=False)
        return table


def file_names(files: Sequence[str]) -> list[str]:
    """What rows are named after: the files' names, or their paths as given where two have the same name."""
    names = [Path(file).name for file in files]
    return names if len(set(names)) == len(names) else list(files)


def _open(file: str) -> pq.ParquetFile:
    if not Path(file).is_file():
        raise ValueError(f"data file {file} does not exist")
    try:
        return pq.ParquetFile(file, memory_map=True)
    except pa.ArrowException as error:
        raise ValueError(f"data file {file} is not parquet: {error}") from error


def _fingerprint(files: Sequence[str]) -> str:
    """Differs when the files differ in number, size, or anything in their first and last 4 MiB."""
    digest = hashlib.sha256()
    for file in files:
        size = Path(file).stat().st_size
        digest.update(str(size).encode())
        with Path(file).open("rb") as handle:
            digest.update(handle.read(_FINGERPRINT_BYTES))
            handle.seek(max(size - _FINGERPRINT_BYTES, 0))
            digest.update(handle.read())
    return digest.hexdigest()
