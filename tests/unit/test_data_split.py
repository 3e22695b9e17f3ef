"""Which rows are tied together, and which of them are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from megatron_mmrl.data.split import RowKeys, choose_test, components, question_key


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
