"""The quickstart's task: questions about real scanned digits (scikit-learn's ``load_digits``), in veRL's schema.

1,797 scans of 8 x 8 grey pixels. A scan is in the training files or in the test file, never in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from megatron_mmrl.data.images import to_png
from megatron_mmrl.types import IMAGE_TAG

Task = Literal["read", "add", "both"]
TASKS = ("read", "add", "both")

_NUM_TEST_SCANS = 397
_QUESTIONS = {
    "read": "<image>Which digit is this? Think, then answer.",
    "add": "<image><image>Add the two digits. Think, then answer.",
}
_ROW_GROUP = 256  # rows that a reader decodes at once
_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("split", pa.string()), ("solution", pa.string()), ("scans", pa.list_(pa.int64()))]),
        ),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsOptions:
    """What is asked, and how often."""

    task: Task = "read"
    """``read``: one image, one digit. ``add``: two images, the sum. ``both``: the two in turn."""
    train_rows: int = 2048
    test_rows: int = 256
    seed: int = 0
    """Order and pairing of the scans; which scans are held out does not depend on it."""
    untagged_share: float = 0.65
    """Share of the rows whose written solution gives the answer without its tags, as found solutions do. The rewards
    want the tags: that, and reading better, is left to reinforcement learning."""
    image_size: int = 56
    """Side of the square PNG in pixels; 56 gives four image tokens."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is not known; use one of {', '.join(TASKS)}")
        if not 0.0 <= self.untagged_share <= 1.0:
            raise ValueError(f"untagged_share={self.untagged_share}: must be between 0 and 1")
        if self.train_rows < 1 or self.test_rows < 1:
            raise ValueError(f"train_rows={self.train_rows}, test_rows={self.test_rows}: both must be at least 1")


def write_digits(out_dir: Path, options: DigitsOptions | None = None) -> None:
    """Write ``train.parquet`` and ``test.parquet`` to ``out_dir``; the same options give the same rows."""
    from sklearn.datasets import load_digits

    options = options or DigitsOptions()
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    png = cache(lambda scan: _png(images[scan].reshape(8, 8), options.image_size))
    order = np.random.default_rng(0).permutation(len(labels))
    splits = {
        "train": (order[_NUM_TEST_SCANS:], options.train_rows),
        "test": (order[:_NUM_TEST_SCANS], options.test_rows),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for number, (split, (pool, num_rows)) in enumerate(splits.items()):
        rng = np.random.default_rng([options.seed, number])
        tagged = np.random.default_rng([options.seed, number, 1]).random(num_rows) >= options.untagged_share
        questions = islice(_questions(pool, options.task, rng), num_rows)
        rows = [
            _row(task, split, scans, labels, png, tagged=bool(tag))
            for (task, scans), tag in zip(questions, tagged, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), out_dir / f"{split}.parquet", row_group_size=_ROW_GROUP)


def digits_texts() -> tuple[str, ...]:
    """Questions and solutions, for learning a tokenizer in which each word is one token."""
    questions = [question.replace(IMAGE_TAG, "") for question in _QUESTIONS.values()]
    return (*questions, _solution("read", [7]), _solution("add", [3, 4]))


def _questions(pool: NDArray[np.int64], task: Task, rng: np.random.Generator) -> Iterator[tuple[str, list[int]]]:
    """Task and scans of one row after another; every scan of the pool is used before one is used again."""
    scans = (scan for _ in repeat(None) for scan in rng.permutation(pool).tolist())
    for kind in cycle(("read", "add") if task == "both" else (task,)):
        yield kind, list(islice(scans, _QUESTIONS[kind].count(IMAGE_TAG)))


def _row(
    task: str, split: str, scans: Sequence[int], labels: NDArray[np.int64], png: Callable[[int], bytes], *, tagged: bool
) -> dict[str, Any]:
    digits = [int(labels[scan]) for scan in scans]
    return {
        "data_source": f"digits/{task}",
        "prompt": [{"role": "user", "content": _QUESTIONS[task]}],
        "images": [{"bytes": png(scan), "path": None} for scan in scans],
        "ability": "digits",
        "reward_model": {"style": "rule", "ground_truth": str(sum(digits))},
        "extra_info": {"split": split, "solution": _solution(task, digits, tagged=tagged), "scans": list(scans)},
    }


def _solution(task: str, digits: Sequence[int], *, tagged: bool = True) -> str:
    thought = "+".join(map(str, digits)) if task == "add" else str(digits[0])
    answer = f"<answer>{sum(digits)}</answer>" if tagged else str(sum(digits))
    return f"<think>{thought}</think>{answer}"


def _png(pixels: NDArray[np.float64], size: int) -> bytes:
    """Grey levels 0 .. 16, white on black, enlarged."""
    grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    return to_png(grey.resize((size, size), resample=Image.Resampling.BILINEAR))
