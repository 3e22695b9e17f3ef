"""A handful of rows of each data set, made up, in the form in which its publisher serves it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NUM_ROWS = 8


def png(number: int, side: int = 56) -> bytes:
    """A picture that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(number: int) -> dict[str, Any]:
    """How Hugging Face's Image column lies in parquet."""
    return {"bytes": png(number), "path": f"{number}.png"}


def parquet(path: Path, row: Callable[[int], dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row(number) for number in range(NUM_ROWS)]), path)
    return str(path)


def jsonl(path: Path, row: Callable[[int], dict[str, Any]]) -> str:
    """The rows, and their pictures below ``images/``."""
    (path.parent / "images").mkdir(parents=True)
    for number in range(NUM_ROWS):
        (path.parent / "images" / f"{number}.png").write_bytes(png(number))
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(NUM_ROWS)))
    return str(path)


def siirl(raw: Path) -> Sequence[str]:
    return [
        jsonl(
            raw / "mm_eureka.jsonl",
            lambda n: {
                "id": str(n),
                "conversations": [{"role": "user", "content": f"<image>How many corners has figure {n}?"}],
                "answer": f"${n + 3}$",
                "image_urls": [f"images/{n}.png"],
            },
        )
    ]


def mm_eureka(raw: Path) -> Sequence[str]:
    def row(n: int) -> dict[str, Any]:
        image = {"type": "image", "image": f"file://{raw.resolve()}/images/{n}.png"}
        text = {"type": "text", "text": f"What is {n} + {n}?"}
        return {"id": str(n), "message": json.dumps([{"role": "user", "content": [image, text]}]), "answer": f"{2 * n}"}

    return [jsonl(raw / "k12.jsonl", row)]


def mmk12(raw: Path) -> Sequence[str]:
    return [
        parquet(
            raw / "data" / "train-0.parquet",
            lambda n: {
                "id": f"q{n}",
                "question": f"<image>What is {n} - 1?",
                "answer": str(n - 1),
                "subject": "math",
                "image": picture(n),
            },
        )
    ]


def boxed_math(raw: Path) -> Sequence[str]:
    """All five data sets of the veRL tutorial, below one directory."""
    parquet(
        raw / "geometry3k" / "data" / "train-0.parquet",
        lambda n: {"images": [picture(n)], "problem": f"<image>Find x in {n}.", "answer": f"{n}.5"},
    )
    parquet(
        raw / "mathvision" / "data" / "test-0.parquet",
        lambda n: {
            "id": str(n),
            "question": f"How many pieces has <image1> of {n}?",
            "options": ["3", "4", "5"] if n % 2 else [],
            "image": f"images/{n}.jpg",
            "decoded_image": picture(10 + n),
            "answer": "B" if n % 2 else "7",
            "solution": None,
            "level": 1 + n % 5,
            "subject": "counting",
        },
    )
    parquet(
        raw / "polymath" / "testmini.parquet",
        lambda n: {
            "id": str(n),
            "image": picture(20 + n),
            "answer_option": ["A", "B", "C", "D"],
            "final_answer": "C",
            "category": "pattern_recognition",
        },
    )
    (raw / "scemqa" / "images").mkdir(parents=True)
    for n in range(NUM_ROWS):
        (raw / "scemqa" / "images" / f"{n}.png").write_bytes(png(30 + n))
    rows = [
        {
            "ImagePath": f"scemqa/images/{n}",
            "Question": f"Which force is {n} N?\n(A) drag\n(B) lift",
            "Answer (final answer highlighted)": "A",
            "Explanation": "by definition",
        }
        for n in range(NUM_ROWS)
    ]
    (raw / "scemqa" / "Multiple_Choice.json").write_text(json.dumps({"Physics": rows}))
    parquet(
        raw / "wemath" / "data" / "testmini-0.parquet",
        lambda n: {
            "ID": str(n),
            "split": "testmini",
            "knowledge concept": "Understanding of Angles",
            "question": f"Which angle is larger in {n}?",
            "option": "A. left; B. right; C. equal; D. No correct answer",
            "answer": "B",
            "image_path": picture(40 + n),
            "key": "1step",
            "question number": n,
        },
    )
    return [str(raw)]


def r1v(problem: str) -> Callable[[Path], Sequence[str]]:
    """R1-V's columns, which ms-swift's three data sets have."""

    def write(raw: Path) -> Sequence[str]:
        return [
            parquet(
                raw / "train-0.parquet",
                lambda n: {
                    "image": picture(n),
                    "problem": problem.format(n=n),
                    "solution": f"<answer> {n + 1} </answer>",
                    "original_question": "as above",
                },
            )
        ]

    return write


def mathvista(raw: Path) -> Sequence[str]:
    return [
        parquet(
            raw / "data" / "testmini-0.parquet",
            lambda n: {
                "pid": str(n),
                "question": f"What is the height of bar {n}?",
                "image": f"images/{n}.jpg",
                "decoded_image": picture(n),
                "choices": ["2", "4", "6"] if n % 2 else None,
                "unit": None,
                "precision": 1.0,
                "answer": "4" if n % 2 else "1.2",
                "question_type": "multi_choice" if n % 2 else "free_form",
                "answer_type": "integer" if n % 2 else "float",
                "metadata": {"task": "figure question answering", "skills": ["statistical reasoning"]},
                "query": "Hint: ...",
            },
        )
    ]
