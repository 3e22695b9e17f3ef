"""Train and test without leaks: rows that share a question or a picture stay together, whatever file they came from.

Which rows are held out depends on their content and the seed alone, not on their order.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SplitBy = Literal["either", "image", "question"]
SPLIT_BY = ("either", "image", "question")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKeys:
    """What rows ask about, as 64-bit hashes: 8 bytes a question and a picture is all that is kept of a row."""

    questions: NDArray[np.uint64]  # [rows]
    images: NDArray[np.uint64]  # [pictures], those of one row after those of another
    image_counts: NDArray[np.int64]  # [rows]

    @classmethod
    def join(cls, parts: Sequence[RowKeys]) -> RowKeys:
        """The rows of all parts, in order."""
        return cls(
            questions=np.concatenate([np.zeros(0, np.uint64), *(part.questions for part in parts)]),
            images=np.concatenate([np.zeros(0, np.uint64), *(part.images for part in parts)]),
            image_counts=np.concatenate([np.zeros(0, np.int64), *(part.image_counts for part in parts)]),
        )


def question_key(question: str) -> int:
    """Equal for questions that differ in case, width of letters and spacing only; 0: nothing is asked in words."""
    text = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def components(keys: RowKeys, by: SplitBy) -> NDArray[np.int64]:
    """Label of each row, [rows]; equal for rows that are tied by shared questions or pictures, over any detour.

    Args:
        keys: what the rows hold.
        by: ``either`` ties rows by questions and by pictures; ``image`` by pictures, and rows that have none by their
            question; ``question`` by questions alone.
    """
    num_rows = len(keys.questions)
    rows = np.arange(num_rows)
    asks = rows[(keys.questions != 0) & ((keys.image_counts == 0) | (by != "image"))]
    shows = np.repeat(rows, keys.image_counts) if by != "question" else rows[:0]
    _, question_ids = np.unique(keys.questions[asks], return_inverse=True)
    _, image_ids = np.unique(keys.images[: len(shows)], return_inverse=True)
    members = np.concatenate([asks, shows])
    ties = np.concatenate([question_ids, len(asks) + image_ids])
    labels = rows
    while True:
        least = np.full(len(members), num_rows)  # of a question or picture: the least label among its rows
        np.minimum.at(least, ties, labels[members])
        lower = labels.copy()
        np.minimum.at(lower, members, least[ties])
        lower = lower[lower]  # a label is a row, whose own label may be lower still: long chains close in a few rounds
        if np.array_equal(lower, labels):
            return labels
        labels = lower


def choose_test(keys: RowKeys, labels: NDArray[np.int64], percent: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out, [rows]: whole components, as near below ``percent`` of the rows as they allow.

    Raises:
        ValueError: the components are so large that less than half of the rows asked for can be held out.
    """
    num_rows = len(labels)
    wanted = min(max(1, round(num_rows * percent / 100)), num_rows - 1)  # something is left to train on
    if percent == 0 or wanted <= 0:
        return np.zeros(num_rows, np.bool_)
    _, labels = np.unique(labels, return_inverse=True)
    sizes = np.bincount(labels)
    identity = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)  # of a component: its least key
    np.minimum.at(identity, labels, np.where(keys.questions == 0, np.iinfo(np.uint64).max, keys.questions))
    np.minimum.at(identity, np.repeat(labels, keys.image_counts), keys.images)
    taken, chosen = 0, np.zeros(len(sizes), np.bool_)
    for component in np.argsort(_mixed(identity, seed), kind="stable"):
        if taken + sizes[component] <= wanted:
            chosen[component] = True
            taken += sizes[component]
        if taken == wanted:
            break
    if 2 * taken < wanted:
        raise ValueError(
            f"only {taken} of {wanted} rows can be held out: {sizes.max()} of {num_rows} rows are tied together by "
            "questions or pictures that they share; where one question is asked of many pictures, split by image "
            "(--split-by image)"
        )
    return chosen[labels]


def _mixed(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014) of key + seed: an order that is the same on every machine."""
    with np.errstate(over="ignore"):
        mixed = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
