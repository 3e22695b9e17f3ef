"""One span of rows -> one part with its pictures checked; and the parts -> the files of the splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_mmrl.data.errors import BadImageError, BadRowError
from megatron_mmrl.data.fetch import FetchLimits, fetch
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.images import open_image, pixel_hash, read_image
from megatron_mmrl.data.raw import ALIGN, Span, read_span
from megatron_mmrl.data.schema import SCHEMA, WRITER, place, question_of, record_batch, to_row
from megatron_mmrl.data.split import RowKeys, question_key
from megatron_mmrl.data.template import Template, load_template
from megatron_mmrl.types import Prompt

_GROUP_ROWS = 64
_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PartJob:
    """What a process has to know; see PrepareOptions."""

    format: str
    image_root: str | None
    fetch_limits: FetchLimits | None
    template: str | None
    data_source: str | None
    max_decoded_pixels: int
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The good rows of a span."""

    path: Path
    keys: RowKeys
    bad: tuple[tuple[int, str], ...]  # row within the file, reason


def row_reader(
    format: str, image_root: str | None, fetch_limits: FetchLimits | None
) -> Callable[[dict[str, object], str], Prompt]:
    """(columns, prompt id) -> prompt without template; images from the web within ``fetch_limits``, None: refused."""
    get = None if fetch_limits is None else partial(fetch, limits=fetch_limits)
    image = partial(read_image, image_root=image_root, fetch=get)

    def read(row: dict[str, object], prompt_id: str) -> Prompt:
        try:
            return FORMATS[format](row, prompt_id, image)
        except RecursionError as error:
            raise BadRowError("values lie in one another too deeply") from error

    return read


def write_part(job: PartJob, numbered: tuple[int, Span]) -> Part:
    """Read span number n, write its good rows to ``part-n.arrow``. Raises ValueError where its file is damaged."""
    number, span = numbered
    template = Template() if job.template is None else load_template(job.template)
    read = row_reader(job.format, job.image_root, job.fetch_limits)
    questions: list[int] = []
    images: list[list[int]] = []
    bad: list[tuple[int, str]] = []
    path = job.folder / f"part-{number:06}.arrow"
    with PartWriter(path) as writer:
        for row, columns in read_span(span):
            if (row - span.first_row) % ALIGN == 0:
                writer.flush()  # groups end where a span could end: they do not depend on how rows were spread
            try:
                if isinstance(columns, BadRowError):
                    raise columns
                prompt = read(columns, f"{span.name}:{row}")
                pictures = [pixel_hash(open_image(data, job.max_decoded_pixels)) for data in prompt.images]
            except (BadRowError, BadImageError) as error:
                bad.append((row, str(error)))
                continue
            question = question_of(prompt)
            named = prompt if job.data_source is None else replace(prompt, source=job.data_source)
            writer.add(to_row(template.apply(named), question), sum(map(len, prompt.images)))
            questions.append(question_key(question))
            images.append(pictures)
    keys_of_part = RowKeys(
        questions=np.array(questions, np.uint64),
        images=np.array([key for keys in images for key in keys], np.uint64),
        image_counts=np.array([len(keys) for keys in images], np.int64),
    )
    return Part(path=path, keys=keys_of_part, bad=tuple(bad))


def write_splits(parts: Sequence[Path], is_test: NDArray[np.bool_], folder: Path) -> None:
    """Move the rows of all parts to ``train.parquet`` or ``test.parquet``; a file without rows is not written."""
    start = 0
    with ExitStack() as stack:
        writers = {
            held_out: stack.enter_context(SplitWriter(folder / f"{split}.parquet", split))
            for split, held_out in (("train", False), ("test", True))
            if (is_test == held_out).any()
        }
        for path in parts:
            # Not mapped: memory holds a batch, not the part. Arrow's own pool takes new pages for every batch, a third
            # of the time that all of this takes.
            file = pa.OSFile(str(path), memory_pool=pa.system_memory_pool())
            batches = pa.ipc.open_file(file)
            for number in range(batches.num_record_batches):
                rows = batches.get_batch(number)
                for first, last in _runs(is_test[start : start + len(rows)]):
                    writers[bool(is_test[start + first])].add(rows.slice(first, last - first))
                start += len(rows)
            path.unlink()


def _runs(values: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[first, last) of each stretch of equal values: rows are cut there, which copies none of them."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(itertools.pairwise(edges))


class PartWriter:
    """An arrow file of rows in batches: cheap to write and to map, gone when its rows have been split."""

    def __init__(self, path: Path) -> None:
        self._writer = pa.ipc.new_file(path, SCHEMA)
        self._rows: list[dict[str, object]] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._writer.close()

    def add(self, row: dict[str, object], num_bytes: int) -> None:
        """One row and the size of its images."""
        self._rows.append(row)
        self._bytes += num_bytes
        if self._bytes >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a batch."""
        if self._rows:
            self._writer.write_batch(record_batch(self._rows))
        self._rows, self._bytes = [], 0


class SplitWriter:
    """A split's parquet file in row groups of so many rows, or of fewer where their bytes are many."""

    def __init__(self, path: Path, split: str) -> None:
        self._split, self._written = split, 0
        self._writer = pq.ParquetWriter(path, SCHEMA, **WRITER)
        self._waiting: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0  # of what is waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._writer.close()

    def add(self, rows: pa.RecordBatch) -> None:
        """Rows in order, at least one."""
        if self._bytes + rows.nbytes > _GROUP_BYTES:
            self._flush()
        self._waiting.append(rows)
        self._rows += len(rows)
        self._bytes += rows.nbytes
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            rows = pa.Table.from_batches(self._waiting).combine_chunks()  # pieces would be written half as fast
            group = place(rows, self._split, self._written)
            self._writer.write_table(group, row_group_size=len(group))
            self._written += len(group)
        self._waiting, self._rows, self._bytes = [], 0, 0
