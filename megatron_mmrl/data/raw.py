"""Rows of data files in any form they come in, cut into spans that processes read on their own, one row at a time.

A span is aligned to ``ALIGN`` rows within its row group, so that what is written of it does not depend on how many
processes there are.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.parquet import file_names

ALIGN = 64
_SPANS_PER_JOB = 8
_MAX_SPAN = 4096  # rows; progress is shown per span
_MAX_WHOLE_BYTES = 512 << 20
# Pages are read as they come, neither mapped nor ahead: a row group may be as large as its file.
_PAGE_BY_PAGE = {"pre_buffer": False, "buffer_size": 1 << 20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """``num_rows`` rows of a file in a row."""

    file: str
    name: str
    """Of the file, for people; see file_names."""
    part: int
    """Row group of parquet, record batch of arrow, byte offset of jsonl; 0 of json and csv."""
    start: int
    """First row within the part."""
    first_row: int
    """First row within the file."""
    num_rows: int


def plan_spans(files: Sequence[str], jobs: int) -> list[Span]:
    """All rows of ``files``, in order, in spans for ``jobs`` processes.

    Raises:
        ValueError: a file is missing, given twice, of an unknown kind, or not what its ending says.
    """
    if twice := [file for number, file in enumerate(files) if file in files[:number]]:
        raise ValueError(f"data file {twice[0]} is given twice")
    parts = [(file, name, _parts(file)) for file, name in zip(files, file_names(files), strict=True)]
    total = sum(rows for _, _, found in parts for _, rows in found)
    wanted = min(_MAX_SPAN, _aligned(total / (jobs * _SPANS_PER_JOB)))
    spans = []
    for file, name, found in parts:
        first_row = 0
        for part, rows in _joined(found, wanted) if _kind(file) == "jsonl" else found:
            size = max(wanted, _aligned(rows / (2 * jobs)))  # each span of a row group reads it from its start
            spans += [
                Span(file=file, name=name, part=part, start=at, first_row=first_row + at, num_rows=min(size, rows - at))
                for at in range(0, rows, size)
            ]
            first_row += rows
    return spans


def read_span(span: Span) -> Iterator[tuple[int, dict[str, object] | BadRowError]]:
    """(row within the file, its columns or why there are none). Raises ValueError where the file is damaged.

    Blank lines of jsonl have a number, but nothing is said of them.
    """
    rows = islice(_READERS[_kind(span.file)](span), span.num_rows)
    return ((number, row) for number, row in enumerate(rows, start=span.first_row) if row is not None)


def _aligned(rows: float) -> int:
    return max(1, math.ceil(rows / ALIGN)) * ALIGN


def _kind(file: str) -> str:
    kind = Path(file).suffix.lower().removeprefix(".").replace("ndjson", "jsonl")
    if kind not in _READERS:
        raise ValueError(f"data file {file}: its ending must be one of .{', .'.join(_READERS)}")
    return kind


def _parts(file: str) -> list[tuple[int, int]]:
    """(part, number of rows) of a file."""
    if Path(file).is_dir():
        raise ValueError(f"{file} is a directory; name the data files in it")
    if not Path(file).is_file():
        raise ValueError(f"data file {file} does not exist")
    kind = _kind(file)
    try:
        if kind == "parquet":
            metadata = pq.ParquetFile(file).metadata
            return [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
        if kind == "arrow":
            return [(number, batch.num_rows) for number, batch in enumerate(_batches(file))]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data file {file} is not {kind}: {error}") from error
    return _jsonl_parts(file) if kind == "jsonl" else [(0, len(_WHOLE[kind](file)))]


def _parquet_rows(span: Span) -> Iterator[dict[str, object]]:
    file = pq.ParquetFile(span.file, **_PAGE_BY_PAGE)
    try:
        at = 0
        for batch in file.iter_batches(batch_size=ALIGN // 2, row_groups=[span.part], use_threads=False):
            for row in range(max(span.start - at, 0), batch.num_rows):
                yield batch.slice(row, 1).to_pylist()[0]
            at += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{span.file}: row group {span.part} cannot be read: {error}") from error


def _arrow_rows(span: Span) -> Iterator[dict[str, object]]:
    (batch,) = islice(_batches(span.file), span.part, span.part + 1)
    for row in range(span.start, batch.num_rows):
        yield batch.slice(row, 1).to_pylist()[0]


def _batches(file: str) -> Iterator[pa.RecordBatch]:
    """Batches of either form of arrow's files, mapped: a batch passed over costs nothing."""
    source = pa.memory_map(file)
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def _jsonl_parts(file: str) -> list[tuple[int, int]]:
    """Byte offset and number of lines of every ``ALIGN`` lines; blank lines count."""
    parts, offset = [], 0
    with Path(file).open("rb") as lines:
        while block := list(islice(lines, ALIGN)):
            parts.append((offset, len(block)))
            offset += sum(map(len, block))
    return parts


def _joined(parts: Sequence[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    """Parts of about ``rows`` lines: a reader of lines goes on from one to the next."""
    step = rows // ALIGN
    groups = [parts[at : at + step] for at in range(0, len(parts), step)]
    return [(group[0][0], sum(lines for _, lines in group)) for group in groups]


def _jsonl_rows(span: Span) -> Iterator[dict[str, object] | BadRowError | None]:
    with Path(span.file).open("rb") as lines:
        lines.seek(span.part)
        for line in islice(lines, span.start, None):
            if line.isspace():
                yield None
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRowError(f"the line is not JSON: {error}")
                continue
            yield row if isinstance(row, dict) else BadRowError(f"the line holds {type(row).__name__}, not an object")


def _json_rows(file: str) -> list[dict[str, object] | BadRowError]:
    """A list of rows, an object of rows by id, or an object of lists by subject. Read whole: such files are small."""
    read = _small(file)
    try:
        content = json.loads(read)
    except ValueError as error:
        raise ValueError(f"data file {file} is not JSON: {error}") from error
    rows: list[object] = []
    for key, value in content.items() if isinstance(content, dict) else [(None, content)]:
        if isinstance(value, list):
            rows += [{"Subject": key, **row} if key is not None and isinstance(row, dict) else row for row in value]
        else:
            rows.append({"id": key, **value} if isinstance(value, dict) else value)
    return [
        row if isinstance(row, dict) else BadRowError(f"the entry holds {type(row).__name__}, not an object")
        for row in rows
    ]


def _csv_rows(file: str) -> list[dict[str, object] | BadRowError]:
    """Rows of text by the names in the first line; a field in quotes may have line breaks, so it is read whole."""
    read = _small(file)
    try:
        rows = list(csv.DictReader(io.StringIO(read.decode("utf-8-sig"), newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"data file {file} is not CSV: {error}") from error
    return [
        BadRowError("the line has more or fewer fields than the first") if None in row or None in row.values() else row
        for row in rows
    ]


def _small(file: str) -> bytes:
    if (size := Path(file).stat().st_size) > _MAX_WHOLE_BYTES:
        raise ValueError(f"data file {file} has {size} bytes; beyond {_MAX_WHOLE_BYTES} it must be .jsonl")
    return Path(file).read_bytes()


_WHOLE = {"json": _json_rows, "csv": _csv_rows}
_READERS = {
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "jsonl": _jsonl_rows,
    "json": lambda span: iter(_json_rows(span.file)[span.start :]),
    "csv": lambda span: iter(_csv_rows(span.file)[span.start :]),
}
