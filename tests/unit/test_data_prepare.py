"""Data sets become train.parquet and test.parquet: nothing lost, nothing leaked, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.dataset import PromptDataset
from megatron_mmrl.data.errors import BadRowError, TooManyBadRowsError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.images import read_image
from megatron_mmrl.data.prepare import PrepareOptions, prepare
from megatron_mmrl.data.raw import ALIGN, plan_spans, read_span
from megatron_mmrl.data.schema import SCHEMA
from megatron_mmrl.data.split import RowKeys, choose_test, components, question_key
from megatron_mmrl.types import Prompt
from tests.unit.data_rows import encoded, picture

ROOT = Path(__file__).resolve().parents[2]


def mm_eureka(folder: Path, num_rows: int, *, questions: int | None = None, images: int | None = None) -> str:
    """A jsonl file; row i asks question i % questions about picture i % images."""
    (folder / "img").mkdir(parents=True)
    for number in range(images or num_rows):
        (folder / f"img/{number}.png").write_bytes(encoded(picture(20, 20, seed=number)))
    lines = []
    for row in range(num_rows):
        turns = [{"role": "user", "content": f"<image>Question {row % (questions or num_rows)}?"}]
        image = f"img/{row % (images or num_rows)}.png"
        lines.append(json.dumps({"id": f"q{row}", "conversations": turns, "answer": row, "image_urls": [image]}))
    (folder / "mm.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "mm.jsonl")


def options(file: str, **changes: Any) -> PrepareOptions:
    return PrepareOptions(**{"files": (file,), "format": "mm_eureka", "image_root": str(Path(file).parent), **changes})


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def prompts_of(folder: Path, split: str) -> list[Prompt]:
    dataset = PromptDataset([str(folder / f"{split}.parquet")], DataConfig())
    return [dataset.prompt(row) for row in range(len(dataset))]


# The whole way.


def test_every_row_arrives_once_as_it_was_read(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 40)
    done = prepare(options(file, test_percent=10, template="siirl"), tmp_path / "out")
    assert (done.train_rows, done.test_rows, done.bad_rows, done.images) == (36, 4, 0, 40)
    assert pq.read_schema(tmp_path / "out/train.parquet").equals(SCHEMA)
    for split, rows in (("train", 36), ("test", 4)):
        values = rows_of(tmp_path / "out", split)
        assert [value["extra_info"]["index"] for value in values] == list(range(rows))
        assert {value["extra_info"]["split"] for value in values} == {split}
    prompts = prompts_of(tmp_path / "out", "train") + prompts_of(tmp_path / "out", "test")
    assert sorted(int(prompt.answer) for prompt in prompts) == list(range(40))
    for prompt in prompts:
        assert prompt.images == ((tmp_path / f"raw/img/{prompt.answer}.png").read_bytes(),)
        assert prompt.meta["question"] == f"Question {prompt.answer}?"
        assert prompt.meta["question_id"] == f"q{prompt.answer}"
        assert prompt.messages[0].text.endswith(f"</answer>. <image>Question {prompt.answer}?")
    assert json.loads((tmp_path / "out/prepared.json").read_text())["train_rows"] == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_meta_comes_back_with_its_types(tmp_path: Path) -> None:
    row = {
        "id": 4, "question": "Which?\n<image1>", "options": ["x", "y"], "answer": "B", "level": 2, "subject": "algebra",
        "decoded_image": {"bytes": encoded(picture(20, 20)), "path": None}, "score": 0.5, "tags": {"a": [1, None]},
    }  # fmt: skip
    file = tmp_path / "mathvision.parquet"
    pq.write_table(pa.Table.from_pylist([row]), file)
    prepare(options(str(file), format="mathvision", test_percent=0), tmp_path / "out")
    (read,) = prompts_of(tmp_path / "out", "train")
    table = pq.read_table(file).to_pylist()[0]
    original = FORMATS["mathvision"](table, "train.parquet:0", lambda entry: read_image(entry, None))
    assert (read.messages, read.images, read.answer) == (original.messages, original.images, "B")
    assert read.source == original.source
    assert {key: read.meta[key] for key in original.meta} == {**original.meta, "question_id": "4"}
    assert read.meta["level"] == 2
    assert not (tmp_path / "out/test.parquet").exists()


def test_the_bytes_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 3 * ALIGN + 5)
    for jobs in (1, 2):
        prepare(options(file, jobs=jobs), tmp_path / f"out{jobs}")
    for name in ("train.parquet", "test.parquet", "prepared.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_row_groups_stay_small(tmp_path: Path) -> None:
    prepare(options(mm_eureka(tmp_path / "raw", 150), test_percent=0), tmp_path / "out")
    metadata = pq.ParquetFile(tmp_path / "out/train.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [64, 64, 22]


def test_bad_rows_are_listed_up_to_the_limit(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 50)
    (tmp_path / "raw/img/7.png").write_bytes(b"not an image")
    (tmp_path / "raw/img/9.png").unlink()
    with open(file, "a") as lines:
        lines.write("{broken\n")
    done = prepare(options(file, max_bad_fraction=0.06), tmp_path / "out")
    assert (done.bad_rows, done.train_rows + done.test_rows) == (3, 48)
    listed = [json.loads(line) for line in (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in listed] == [("mm.jsonl", 7), ("mm.jsonl", 9), ("mm.jsonl", 50)]
    assert ["no image" in listed[0]["reason"], "no such file" in listed[1]["reason"]] == [True, True]
    with pytest.raises(TooManyBadRowsError, match="3 of 51 rows are bad"):
        prepare(options(file, max_bad_fraction=0.05), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_pictures_outside_the_root_are_refused(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 3)
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(picture(20, 20)))
    (tmp_path / "raw/img/0.png").unlink()
    (tmp_path / "raw/img/0.png").symlink_to(secret)
    with pytest.raises(TooManyBadRowsError, match=r"leads outside data\.image_root"):
        prepare(options(file), tmp_path / "out")


def test_an_output_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 20)
    out = tmp_path / "out"
    prepare(options(file), out)
    before = (out / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"out exists and holds prepared\.json.*--overwrite"):
        prepare(options(file, seed=1), out)
    assert (out / "train.parquet").read_bytes() == before
    prepare(options(file, seed=1), out, overwrite=True)
    assert (out / "train.parquet").read_bytes() != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt; give another"):
        prepare(options(file), out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_what_cannot_be_prepared_says_why(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 3)
    for changes, reason in (
        ({"format": "mm_eurek"}, "format 'mm_eurek' is not known"),
        ({"template": "none"}, "template 'none'"),
        ({"test_percent": 100}, "below 100"),
        ({"files": ()}, "no data files"),
        ({"files": ("a.csv",)}, r"a\.csv does not exist"),
    ):
        with pytest.raises(ValueError, match=reason):
            prepare(options(file, **changes), tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="have no rows"):
        prepare(options(str(tmp_path / "empty.jsonl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_max_samples_reads_the_first_rows(tmp_path: Path) -> None:
    done = prepare(options(mm_eureka(tmp_path / "raw", 100), max_samples=70, test_percent=0), tmp_path / "out")
    assert done.train_rows == 70
    assert [prompt.answer for prompt in prompts_of(tmp_path / "out", "train")] == [str(row) for row in range(70)]


# The command of siiRL's example, and what is left when it is stopped.


def example(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "examples/data_preprocess/mm_eureka.py"), *arguments]


def test_the_example_command_works_as_written(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 40)
    command = example("--jsonl_file", file, "--output_dir", "~/data/mm_eureka/", "--nproc", "1")
    home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=home, capture_output=True, text=True, check=True)
    assert "38 train and 2 test rows, 40 images" in done.stdout
    row = rows_of(tmp_path / "data/mm_eureka", "test")[0]
    assert row["data_source"] == "mm_eureka"
    assert row["prompt"][0]["content"].startswith("You should first thinks")
    assert row["reward_model"] == {"style": "rule", "ground_truth": row["extra_info"]["answer"]}
    again = subprocess.run(command, env=home, capture_output=True, text=True, check=False)
    assert (again.returncode, "--overwrite" in again.stderr) == (1, True)


@pytest.mark.parametrize(("number", "status", "jobs"), [(signal.SIGINT, 130, "2"), (signal.SIGTERM, 143, "1")])
def test_a_stopped_command_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int, jobs: str) -> None:
    file = mm_eureka(tmp_path / "raw", 3)
    command = [*example("--jsonl_file", str(tmp_path / "raw/slow.jsonl")), "--output_dir", str(tmp_path / "out")]
    lines = Path(file).read_text() * 10000
    (tmp_path / "raw/slow.jsonl").write_text(lines)
    process = subprocess.Popen(
        [*command, "--nproc", jobs],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == status
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


# Reading in spans.


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


def test_json_files_may_be_grouped_by_subject_or_keyed_by_id(tmp_path: Path) -> None:
    file = tmp_path / "scemqa.json"
    file.write_text(json.dumps({"Math": [{"Question": "a"}, "odd"], "Physics": [{"Question": "b"}]}))
    (first, odd, last) = (columns for _, columns in read_all([str(file)], 1))
    assert (first, last) == ({"Subject": "Math", "Question": "a"}, {"Subject": "Physics", "Question": "b"})
    assert isinstance(odd, BadRowError)
    file.write_text(json.dumps({"1": {"question": "a"}}))
    assert read_all([str(file)], 1) == [(0, {"id": "1", "question": "a"})]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", b"no", "is not parquet"),
        ("a.arrow", b"no", "is not arrow"),
        ("a.json", b"{", "is not JSON"),
        ("a.csv", b"x", "must be one of .parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.* {reason}"):
        plan_spans([str(tmp_path / name)], 1)


# The split.


def keys(questions: Sequence[str], images: Sequence[Sequence[int]]) -> RowKeys:
    return RowKeys(
        questions=np.array([question_key(question) for question in questions], np.uint64),
        images=np.array([key for row in images for key in row], np.uint64),
        image_counts=np.array([len(row) for row in images], np.int64),
    )


def test_rows_are_tied_by_what_they_share_over_any_detour() -> None:
    rows = keys(["a", " A ", "b", "c", "", "", "d"], [[1], [2], [2, 3], [3], [4], [5], []])
    assert components(rows, "either").tolist() == [0, 0, 0, 0, 4, 5, 6]
    assert components(rows, "image").tolist() == [0, 1, 1, 1, 4, 5, 6]
    assert components(rows, "question").tolist() == [0, 0, 2, 3, 4, 5, 6]


def test_a_long_chain_is_one_component() -> None:
    """Row i shows pictures i and i + 1: row 0 and the last have nothing in common but the way between them."""
    order = np.random.default_rng(0).permutation(3000)
    chain = keys([f"q{row}" for row in order], [[int(row) + 10, int(row) + 11] for row in order])
    assert set(components(chain, "either").tolist()) == {0}


@pytest.mark.parametrize("seed", range(5))
def test_no_question_and_no_picture_is_on_both_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    questions = [f"q{number}" for number in rng.integers(0, 1500, 1000)]
    images = [rng.integers(1, 4000, rng.integers(0, 3)).tolist() for _ in range(1000)]
    rows = keys(questions, images)
    held_out = choose_test(rows, components(rows, "either"), 10, seed)
    assert 50 <= held_out.sum() <= 100
    assert not {questions[row] for row in np.flatnonzero(held_out)} & {
        questions[row] for row in np.flatnonzero(~held_out)
    }
    seen = [{key for row in np.flatnonzero(mask) for key in images[row]} for mask in (held_out, ~held_out)]
    assert not seen[0] & seen[1]


def test_the_choice_depends_on_content_and_seed_alone() -> None:
    questions = [f"q{row}" for row in range(200)]
    order = np.random.default_rng(1).permutation(200)

    def held_out(rows: Sequence[str], seed: int) -> set[str]:
        some = keys(rows, [[] for _ in rows])
        mask = choose_test(some, components(some, "either"), 5, seed)
        return {rows[row] for row in np.flatnonzero(mask)}

    first = held_out(questions, 0)
    assert len(first) == 10
    assert held_out([questions[row] for row in order], 0) == first
    assert held_out(questions, 1) != first


def test_one_question_for_all_pictures_needs_a_split_by_image(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 40, questions=1)
    with pytest.raises(ValueError, match=r"40 of 40 rows are tied together.*split by image"):
        prepare(options(file), tmp_path / "out")
    assert prepare(options(file, split_by="image"), tmp_path / "out").test_rows == 2


def test_rows_of_one_picture_stay_together(tmp_path: Path) -> None:
    prepare(options(mm_eureka(tmp_path / "raw", 60, images=20), test_percent=20), tmp_path / "out")
    sides = [{prompt.images for prompt in prompts_of(tmp_path / "out", split)} for split in ("train", "test")]
    assert (len(sides[0]), len(sides[1])) == (16, 4)
    assert not sides[0] & sides[1]
