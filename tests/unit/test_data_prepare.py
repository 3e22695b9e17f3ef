"""Data sets become train.parquet and test.parquet: nothing lost, nothing leaked, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mmrl import cli
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data import parts
from megatron_mmrl.data.dataset import PromptDataset
from megatron_mmrl.data.errors import BadRowError, TooManyBadRowsError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.images import read_image
from megatron_mmrl.data.parts import row_reader
from megatron_mmrl.data.prepare import PrepareOptions, prepare
from megatron_mmrl.data.raw import ALIGN
from megatron_mmrl.data.schema import SCHEMA
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


@pytest.mark.parametrize("group_bytes", [1, 4000, 1 << 24])
def test_rows_come_out_of_every_cut_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    """Row groups of one cut each (1 byte), of several, and full ones."""
    monkeypatch.setattr(parts, "_GROUP_BYTES", group_bytes)
    prepare(options(mm_eureka(tmp_path / "in", 150), test_percent=30.0), tmp_path / "out")
    for split in ("train", "test"):
        rows = rows_of(tmp_path / "out", split)
        numbers = [int(row["extra_info"]["id"][1:]) for row in rows]
        assert numbers == sorted(numbers)
        assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
        for number, row in zip(numbers, rows, strict=True):
            assert row["extra_info"]["split"] == split
            assert row["extra_info"]["question"] == f"Question {number}?"
            assert row["reward_model"]["ground_truth"] == str(number)
            assert row["images"][0]["bytes"] == (tmp_path / f"in/img/{number}.png").read_bytes()
    files = [pq.ParquetFile(tmp_path / "out" / f"{split}.parquet").metadata for split in ("train", "test")]
    assert sum(file.num_rows for file in files) == 150
    assert (sum(file.num_row_groups for file in files) > 20) == (group_bytes < 1 << 24)


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


def test_a_row_that_cannot_be_written_is_bad_and_blank_lines_are_nothing(tmp_path: Path) -> None:
    file = mm_eureka(tmp_path / "raw", 3)
    inline = "data:image/png;base64," + "A" * 5000
    with open(file, "a") as lines:
        lines.write("\n  \n")
        for text, image in (("a\ud800b", "img/0.png"), ("x", inline)):
            turns = [{"role": "user", "content": f"<image>{text}"}]
            lines.write(json.dumps({"conversations": turns, "answer": "1", "image_urls": [image]}) + "\n")
        lines.write('{"answer": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    done = prepare(options(file, max_bad_fraction=1), tmp_path / "out")
    assert (done.train_rows + done.test_rows, done.bad_rows) == (3, 3)
    listed = [json.loads(line) for line in (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in listed] == [5, 6, 7]
    assert "recursion" in listed[2]["reason"]
    assert "half a character, '\\ud800'" in listed[0]["reason"]
    assert listed[1]["reason"].startswith("image path 'data:image/png;base64,AAAA")
    assert len(listed[1]["reason"]) < 300


def test_a_row_nested_without_end_is_bad() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    row = {"conversations": [{"role": "user", "content": "2 + 2?"}], "answer": "4", "other": deep}
    with pytest.raises(BadRowError, match="too deeply"):
        row_reader("mm_eureka", None, None)(row, "0")


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
        ({"files": (str(tmp_path),)}, "is a directory; name the data files in it"),
        ({"files": (file, file)}, r"mm\.jsonl is given twice"),
        ({"jobs": 0}, "jobs=0"),
        ({"max_samples": 0}, "max samples=0"),
        ({"max_bad_fraction": 7.0}, r"max bad fraction=7\.0"),
    ):
        with pytest.raises(ValueError, match=reason):
            prepare(options(file, **changes), tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="have no rows"):
        prepare(options(str(tmp_path / "empty.jsonl")), tmp_path / "out")
    with pytest.raises(ValueError, match=r"mm\.jsonl exists and is not a directory"):
        prepare(options(file), Path(file) / "deep/out")
    assert not (tmp_path / "out").exists()


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [mm_eureka(tmp_path / folder, 3) for folder in ("a", "b")]
    (tmp_path / "b/img/1.png").unlink()
    both = options(files[0], files=tuple(files), image_root=str(tmp_path / "b"), max_bad_fraction=1, test_percent=0)
    prepare(both, tmp_path / "out")
    listed = [json.loads(line)["file"] for line in (tmp_path / "out/bad_rows.jsonl").read_text().splitlines()]
    assert listed == files
    assert list(json.loads((tmp_path / "out/prepared.json").read_text())["files"]) == files


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


def test_a_killed_command_leaves_no_output(tmp_path: Path) -> None:
    """SIGKILL cannot be handled: the staged directory stays, hidden, beside where the output would be."""
    file = mm_eureka(tmp_path / "raw", 3)
    slow = tmp_path / "raw/slow.jsonl"
    slow.write_text(Path(file).read_text() * 10000)
    out = ["--output_dir", str(tmp_path / "out"), "--nproc", "2"]
    home = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*example("--jsonl_file", str(slow)), *out], env=home, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait(60)
    while (workers := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not workers
    assert not (tmp_path / "out").exists()
    assert [path.name.startswith(".out.") for path in tmp_path.iterdir() if path.name != "raw"] == [True]
    subprocess.run([*example("--jsonl_file", file, "--test_split", "0"), *out], env=home, check=True)
    assert pq.ParquetFile(tmp_path / "out/train.parquet").metadata.num_rows == 3


def in_session(session: int) -> list[int]:
    """Processes of a session that are not dead."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [int(fields[3]) for fields in stats if int(fields[3]) == session and fields[0] != "Z"]


# The split.


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


def test_one_picture_in_two_files_stays_together(tmp_path: Path) -> None:
    """20 pictures, each saved as PNG and as BMP, under 40 questions."""
    kinds = ["PNG", "BMP"]
    rows = [
        {
            "images": [{"bytes": encoded(picture(20, 20, seed=row // 2), kinds[row % 2])}],
            "problem": f"<image>{row}?",
            "answer": "1",
        }
        for row in range(40)
    ]
    file = tmp_path / "geo.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    done = prepare(options(str(file), format="geometry3k", test_percent=25), tmp_path / "out")
    sides = [
        {int(p.meta["question"][:-1]) // 2 for p in prompts_of(tmp_path / "out", split)} for split in ("train", "test")
    ]
    assert (done.test_rows, len(sides[1])) == (10, 5)
    assert not sides[0] & sides[1]


def test_something_is_left_to_train_on(tmp_path: Path) -> None:
    assert prepare(options(mm_eureka(tmp_path / "one", 1)), tmp_path / "out").train_rows == 1
    done = prepare(options(mm_eureka(tmp_path / "few", 3), test_percent=99), tmp_path / "out3")
    assert (done.train_rows, done.test_rows) == (1, 2)


def test_polymath_asks_in_the_picture_and_is_split_by_it(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": encoded(picture(20, 20, seed=row))}, "answer_option": "['A', 'B']", "final_answer": "A"}
        for row in range(20)
    ]
    file = str(tmp_path / "polymath.parquet")
    pq.write_table(pa.Table.from_pylist(rows), file)
    command = ["data", "prepare", file, "--format", "polymath", "--jobs", "1", "--output-dir", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert len(rows_of(tmp_path / "out", "test")) == 1
