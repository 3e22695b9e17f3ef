"""Readers of the evaluation sets: one real-looking row of each, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.prepare import PrepareOptions, prepare
from megatron_mmrl.rewards.benchmark import Benchmark
from megatron_mmrl.types import Prompt


def read(name: str, row: dict[str, Any]) -> Prompt:
    return FORMATS[name](row, "f.parquet:0", lambda image: b"image " + image["bytes"])


def image(text: bytes) -> dict[str, Any]:
    return {"bytes": text, "path": None}


MATHVERSE = {
    "sample_index": "13",
    "problem_index": "3",
    "problem_version": "Vision Intensive",
    "question": "the measure of angle BOC is ()\nChoices:\nA:25°\nB:50°\nC:65°\nD:75°",
    "image": image(b"1"),
    "answer": "B",
    "question_type": "multi-choice",
    "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
    "query_wo": "Please directly answer ...",
    "query_cot": "First reason, then answer.\nQuestion: the measure of angle BOC is ()\nChoices:\nA:25°",
    "question_for_eval": "As shown, the measure of angle BOC is ()\nChoices:\nA:25°\nB:50°\nC:65°\nD:75°",
}


def test_mathverse() -> None:
    prompt = read("mathverse", MATHVERSE)
    assert prompt.messages[0].text == f"<image>{MATHVERSE['query_cot']}"
    assert (prompt.answer, prompt.images, prompt.source) == ("B", (b"image 1",), "mathverse")
    assert prompt.meta["choices"] == ["25°", "50°", "65°", "75°"]
    assert prompt.meta["subject"] == "Plane Geometry"
    assert prompt.meta["problem_version"] == "Vision Intensive"
    assert prompt.meta["question_id"] == "13"


def test_mathverse_without_options_image_or_columns_of_queries() -> None:
    row = {**MATHVERSE, "image": None, "question": "Find x.", "question_for_eval": "Find x.", "answer": "4"}
    del row["query_cot"]
    prompt = read("mathverse", row)
    assert (prompt.messages[0].text, prompt.images) == ("Find x.", ())
    assert "choices" not in prompt.meta
    with pytest.raises(BadRowError, match="query_cot and question are missing or blank"):
        read("mathverse", {**row, "question": " "})
    with pytest.raises(BadRowError, match="answer is missing or blank"):
        read("mathverse", {**row, "answer": None})


OLYMPIAD = {
    "id": 2231,
    "question": "In <image_2> find x; <image_2> is not to scale.",
    "context": "See the text.",
    "final_answer": ["$2$", "$\\frac{1}{2}$"],
    "image_1": image(b"1"),
    "image_2": image(b"2"),
    "image_3": None,
    "error": "1e-1",
    "is_multiple_answer": True,
    "answer_type": "Numerical",
    "unit": "m",
    "subfield": "Geometry",
    "subject": "Math",
}


def test_olympiad_bench() -> None:
    prompt = read("olympiad_bench", OLYMPIAD)
    assert prompt.messages[0].text == "<image>See the text.\n\nIn <image> find x; image 2 is not to scale."
    assert prompt.images == (b"image 1", b"image 2")  # the one that no tag names stands first
    assert prompt.answer == "$2$, $\\frac{1}{2}$"
    assert prompt.meta["answers"] == ["$2$", "$\\frac{1}{2}$"]
    assert (prompt.meta["tolerance"], prompt.meta["unit"], prompt.meta["question_id"]) == (0.1, "m", "2231")
    listed = {**OLYMPIAD, "images": [image(b"a"), image(b"b")], "error": "0.1,0.2"}
    assert read("olympiad_bench", listed).images == (b"image a", b"image b")
    assert read("olympiad_bench", listed).meta["tolerance"] == [0.1, 0.2]
    assert "tolerance" not in read("olympiad_bench", {**OLYMPIAD, "error": None}).meta


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "see <image_3>"}, r"names image 3, but the row has only \[1, 2\]"),
        ({"final_answer": None}, "final_answer is missing or blank"),
        ({"question": None}, "column 'question' is None"),
        ({"error": "small"}, "error is 'small'; it must be a number"),
    ],
)
def test_olympiad_rows_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError, match=message):
        read("olympiad_bench", {**OLYMPIAD, **change})


def test_problems_without_options() -> None:
    row = {"id": 60, "problem": "Every morning Aya ...", "solution": "...", "answer": "204", "year": "2024"}
    prompt = read("aime24", row)
    assert (prompt.answer, prompt.source, prompt.meta["question_id"]) == ("204", "aime24", "60")
    row = {"problem": "Convert", "solution": "We", "answer": "x", "subject": "Algebra", "level": 2, "unique_id": "t/1"}
    prompt = read("math500", row)
    assert (prompt.meta["subject"], prompt.meta["level"], prompt.meta["question_id"]) == ("Algebra", 2, "t/1")
    with pytest.raises(BadRowError, match="column 'problem' is None"):
        read("math500", {**row, "problem": None})


def gpqa(number: int) -> dict[str, Any]:
    return {
        "Question": f"Which of {number}?",
        "Correct Answer": "right\n",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
        "High-level domain": "Physics",
        "Subdomain": "Optics",
        "Record ID": f"rec{number}",
    }


def test_gpqa_shuffles_the_options_by_the_question_alone() -> None:
    prompts = [read("gpqa_diamond", gpqa(number)) for number in range(400)]
    letters = Counter(prompt.answer for prompt in prompts)
    assert set(letters) == set("ABCD")
    assert min(letters.values()) > 70
    first = prompts[0]
    choices = first.meta["choices"]
    assert isinstance(choices, list)
    assert choices["ABCD".index(first.answer)] == "right"
    assert f"({first.answer}) right\n" in first.messages[0].text + "\n"
    assert first.meta["subject"] == "Physics"
    swapped = {**gpqa(0), "Incorrect Answer 1": "wrong 3", "Incorrect Answer 3": "wrong 1"}
    assert read("gpqa_diamond", swapped) == first
    with pytest.raises(BadRowError, match="two of the options are the same"):
        read("gpqa_diamond", {**gpqa(0), "Incorrect Answer 1": "right"})


@pytest.mark.parametrize(
    ("name", "row", "right", "wrong"),
    [
        ("gpqa_diamond", gpqa(0), "right", "wrong 1"),
        (
            "olympiad_bench",
            {key: value for key, value in OLYMPIAD.items() if not key.startswith("image")} | {"question": "Find x."},
            r"\boxed{0.55}, \boxed{2}",
            r"\boxed{0.7}, \boxed{2}",
        ),
        (
            "math500",
            {"problem": "Who?", "answer": r"\text{Evelyn}", "subject": "Algebra", "level": 2, "unique_id": "t/1"},
            r"\boxed{Evelyn}",
            r"\boxed{Eva}",
        ),
    ],
)
def test_rows_that_were_prepared_are_judged_as_the_published_ones(
    tmp_path: Path, name: str, row: dict[str, Any], right: str, wrong: str
) -> None:
    (tmp_path / "raw.jsonl").write_text(json.dumps(row) + "\n")
    prepare(PrepareOptions(files=(str(tmp_path / "raw.jsonl"),), format=name, test_percent=0), tmp_path / "out")
    (written,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    for prompt in (read(name, row), read("verl", written)):
        assert [Benchmark()(prompt, f"{answer}") for answer in (right, wrong)] == [1.0, 0.0]
        assert prompt.meta.get("subject") == row.get("subject", "Physics")
