"""Rows of files in every form they come in, in spans that processes read on their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.raw import ALIGN, plan_spans, read_span

ROOT = Path(__file__).resolve().parents[2]


def write_forms(folder: Path, num_rows: int) -> list[str]:
    """The same rows as parquet (one row group, many), arrow (stream, file), jsonl and json."""
    rows = [{"id": row, "text": "x" * row} for row in range(num_rows)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "one.parquet", row_group_size=num_rows)
    pq.write_table(table, folder / "many.parquet", row_group_size=50)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=70)
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=70)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    return [str(path) for path in sorted(folder.iterdir())]


def read_all(files: Sequence[str], jobs: int) -> list[tuple[int, Any]]:
    return [pair for span in plan_spans(files, jobs) for pair in read_span(span)]


@pytest.mark.parametrize("jobs", [1, 3])
def test_spans_hold_every_row_once_in_order(tmp_path: Path, jobs: int) -> None:
    for file in write_forms(tmp_path, 333):
        read = read_all([file], jobs)
        assert [row for row, _ in read] == list(range(333)), file
        assert [columns["id"] for _, columns in read] == list(range(333)), file
        assert read[300][1]["text"] == "x" * 300
    both = plan_spans([str(tmp_path / "rows.jsonl"), str(tmp_path / "one.parquet")], jobs)
    assert [span.first_row for span in both].count(0) == 2  # rows are numbered within their file
    assert all(span.start % ALIGN == 0 for span in both)


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """A file of 96 MiB in one row group, read to its end in a process of its own."""
    data = np.random.default_rng(0).bytes(96 << 10)
    table = pa.table({"image": pa.array([data[row:] + data[:row] for row in range(1024)], pa.binary())})
    file = str(tmp_path / "one.parquet")
    pq.write_table(table, file, row_group_size=1024, use_dictionary=False, write_batch_size=8)
    code = (
        "from megatron_mmrl.data.raw import plan_spans, read_span\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        f"spans, before = plan_spans([{file!r}], 1), peak()\n"
        "rows = sum(len(row['image']) > 0 for span in spans for _, row in read_span(span))\n"
        "print(rows, peak() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    rows, grown_mib = map(int, done.stdout.split())
    assert rows == 1024
    assert grown_mib < 48


def test_json_files_may_be_grouped_by_subject_or_keyed_by_id(tmp_path: Path) -> None:
    file = tmp_path / "scemqa.json"
    file.write_text(json.dumps({"Math": [{"Question": "a"}, "odd"], "Physics": [{"Question": "b"}]}))
    (first, odd, last) = (columns for _, columns in read_all([str(file)], 1))
    assert (first, last) == ({"Subject": "Math", "Question": "a"}, {"Subject": "Physics", "Question": "b"})
    assert isinstance(odd, BadRowError)
    file.write_text(json.dumps({"1": {"question": "a"}}))
    assert read_all([str(file)], 1) == [(0, {"id": "1", "question": "a"})]


def test_csv_fields_hold_commas_and_line_breaks(tmp_path: Path) -> None:
    """As GPQA is published: text in quotes over several lines, and a byte order mark at the front."""
    file = tmp_path / "gpqa.csv"
    file.write_bytes(b'\xef\xbb\xbfQuestion,Answer\r\n"Which, of\ntwo ""x""?",\xc3\xa9\r\nshort\r\na,b,c\r\n')
    whole, short, long = read_all([str(file)], 2)
    assert whole == (0, {"Question": 'Which, of\ntwo "x"?', "Answer": "\u00e9"})
    for number, row in (short, long):
        assert number in (1, 2)
        assert str(row) == "the line has more or fewer fields than the first"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"no", "is not parquet"),
        ("a.arrow", b"no", "is not arrow"),
        ("a.json", b"{", "is not JSON"),
        ("a.csv", b'a,b\n"1', "is not CSV"),
        ("a.csv", b"a,b\n\xff,2", "is not CSV"),
        ("a.tsv", b"x", "must be one of .parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* {reason}"):
        plan_spans([str(tmp_path / name)], 1)
