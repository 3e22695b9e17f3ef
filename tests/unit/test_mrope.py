"""Multimodal positions by hand; tests/parity compares them with Hugging Face's."""

import numpy as np
import pytest

from megatron_mmrl.models.qwen2_5_vl.mrope import position_ids

PAD = 9


def positions(ids: list[int], grids: list[list[int]]) -> list[list[int]]:
    grid = np.array(grids, dtype=np.int64).reshape(-1, 3)
    return position_ids(np.array(ids), grid, image_token_id=PAD, merge_size=2).tolist()


def test_text_counts_in_all_rows() -> None:
    assert positions([1, 2, 3], []) == [[0, 1, 2]] * 3


def test_image_spreads_over_height_and_width_and_text_goes_on_after_the_longer_side() -> None:
    """4 x 6 patches are 2 x 3 merged: text at 0, 1; image from 2; text from 2 + 3 on."""
    assert positions([1, 1, PAD, PAD, PAD, PAD, PAD, PAD, 1, 1], [[1, 4, 6]]) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_two_images_without_text_between() -> None:
    assert positions([PAD, PAD, PAD, 1], [[1, 2, 4], [1, 2, 2]]) == [[0, 0, 2, 3], [0, 0, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, PAD, PAD, PAD], "3 image tokens .* make 2"),
        ([1, PAD], "1 image tokens .* make 2"),
        ([PAD, 1, PAD], "2 tokens of an image .* not adjacent from token 0"),
    ],
)
def test_pads_that_do_not_match_the_grids_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        positions(ids, [[1, 2, 4]])
