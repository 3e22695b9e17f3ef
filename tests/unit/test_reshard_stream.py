"""Messages between nodes: cut alike by both sides, never longer than agreed; and which tensors are compared when."""

from __future__ import annotations

import pytest
import torch

from megatron_mmrl.reshard.stream import Stream, cut, message_elements
from megatron_mmrl.reshard.verify import sample


def matrices(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    first, made = 0, []
    for rows, columns in shapes:
        made.append(torch.arange(first, first + rows * columns).view(rows, columns))
        first += rows * columns
    return made


def test_small_matrices_travel_together_and_large_ones_in_parts() -> None:
    messages = cut(matrices((1, 3), (2, 2), (7, 3), (1, 25), (1, 1)), limit=10)
    assert [[tuple(piece.shape) for piece in message] for message in messages] == [
        [(1, 3), (2, 2)],
        [(3, 3)],
        [(3, 3)],
        [(1, 3)],  # the last row; the next piece does not fit behind it
        [(1, 10)],
        [(1, 10)],
        [(1, 5), (1, 1)],
    ]
    flat = torch.cat([piece.flatten() for message in messages for piece in message])
    assert torch.equal(flat, torch.arange(3 + 4 + 21 + 25 + 1))  # all of it, in order, once


def test_pieces_are_views_of_what_is_sent() -> None:
    (matrix,) = matrices((8, 4))
    for message in cut([matrix[:, 1:3]], limit=4):
        for piece in message:
            piece.fill_(-1)
    assert torch.equal(matrix[:, 1:3], torch.full((8, 2), -1))
    assert (matrix[:, [0, 3]] >= 0).all()


@pytest.mark.parametrize("limit", [1, 5, 16, 1000])
def test_both_sides_cut_alike_whatever_lies_around_their_rectangles(limit: int) -> None:
    shapes = [(5, 7), (1, 1), (16, 2), (3, 11)]
    ours = cut(matrices(*shapes), limit)
    theirs = cut([torch.zeros(rows + 2, columns + 3)[1:-1, 2:-1] for rows, columns in shapes], limit)
    assert [[p.shape for p in message] for message in ours] == [[p.shape for p in message] for message in theirs]
    assert all(sum(piece.numel() for piece in message) <= limit for message in ours)


def test_only_what_does_not_lie_in_one_piece_needs_a_buffer() -> None:
    (matrix,) = matrices((8, 4))
    assert Stream(peer=1, sends=True, messages=cut([matrix], 8)).staging_elements == 0
    assert Stream(peer=1, sends=True, messages=cut([matrix[:, :3]], 8)).staging_elements == 6
    assert Stream(peer=1, sends=True, messages=cut([matrix[:1], matrix[4:5]], 8)).staging_elements == 8


def test_all_buffers_of_a_rank_fit_into_the_bucket() -> None:
    assert message_elements(1000, 4, streams=5) == 25  # two buffers each: 5 x 2 x 25 x 4 bytes
    with pytest.raises(ValueError, match=r"reshard\.bucket_bytes=30 cannot hold .* use at least 40"):
        message_elements(30, 4, streams=5)


def test_every_tensor_is_compared_once_in_so_many_hand_overs() -> None:
    assert sample(10, 0, 4) == range(10)
    assert sample(10, 8, 4) == range(10)
    sampled = [list(sample(10, version, 4)) for version in (9, 10, 11)]
    assert sampled == [[1, 5, 9], [2, 6], [3, 7]]
    assert list(sample(3, 5, 1)) == [0, 1, 2]
