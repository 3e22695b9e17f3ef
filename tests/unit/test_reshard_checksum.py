"""Checksums of parts add up, one bit changes them, and padding does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_mmrl.reshard.checksum import as_number, checksum

DTYPES = (torch.float32, torch.bfloat16)


def made(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def whole(matrix: Tensor) -> int:
    return as_number(checksum(matrix))


def test_it_is_the_sum_that_the_documentation_gives() -> None:
    """Worked out with Python's integers: splitmix64 of each position, words with their sign, modulo 2^64."""
    words = torch.tensor([[3, -5], [2**31 - 1, -(2**31)]], dtype=torch.int32)

    def weight(position: int, salt: int) -> int:
        mask = 2**64 - 1
        z = ((position + 1) * 0x9E3779B97F4A7C15 + salt) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return (z ^ z >> 31) | 1

    cells = [(row, column) for row in range(2) for column in range(2)]
    expected = sum(int(words[row, column]) * weight(row, 2) * weight(column, 1) for row, column in cells) % 2**64
    assert whole(words.view(torch.float32)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rectangles_add_up(dtype: torch.dtype) -> None:
    matrix = made(37, 29, dtype)
    parts = [
        checksum(matrix[top : top + 11, left : left + 10], top=top, left=left)
        for top in range(0, 37, 11)
        for left in range(0, 29, 10)
    ]
    assert as_number(sum(parts)) == whole(matrix)
    moved = checksum(matrix[:11], top=1) + checksum(matrix[11:], top=11)
    assert as_number(moved) != whole(matrix)


def test_rows_that_are_read_in_several_pieces_sum_as_one() -> None:
    matrix = made(300, 500, torch.float32)  # more than is widened at a time
    assert whole(matrix) == as_number(sum(checksum(row[None], top=number) for number, row in enumerate(matrix)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_changes_it(dtype: torch.dtype) -> None:
    matrix = made(3, 5, dtype)
    before = whole(matrix)
    bits = matrix.element_size() * 8
    words = matrix.view({16: torch.int16, 32: torch.int32}[bits])
    seen = {before}
    for row in range(3):
        for column in range(5):
            for bit in range(bits):
                flip = (1 << bit) - (1 << bits if bit == bits - 1 else 0)
                words[row, column] ^= flip
                seen.add(whole(matrix))
                words[row, column] ^= flip
    assert len(seen) == 1 + 15 * bits
    assert whole(matrix) == before


def test_order_counts() -> None:
    matrix = made(6, 8, torch.float32)
    wrong = (matrix.flip(0), matrix.flip(1), matrix.roll(1, 0), matrix.roll(1, 1), matrix.reshape(8, 6))
    assert len({whole(matrix), *(whole(other) for other in wrong)}) == 6


def test_zeros_add_nothing_wherever_they_stand() -> None:
    matrix = made(4, 6, torch.bfloat16)
    padded = torch.zeros(9, 11, dtype=torch.bfloat16)
    padded[2:6, 3:9] = matrix
    assert whole(padded) == as_number(checksum(matrix, top=2, left=3))
    padded[8, 10] = -0.0  # not the zero that padding is made of
    assert whole(padded) != as_number(checksum(matrix, top=2, left=3))


def test_a_tensor_is_read_as_rows_of_its_first_dimension() -> None:
    values = made(4, 30, torch.float32)
    assert whole(values.view(4, 5, 3, 2)) == whole(values)
    assert whole(values[:, 0]) == whole(values[:, :1])


def test_elements_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"elements of \[2, 4\] bytes, not of 8 \(torch.float64\)"):
        checksum(torch.zeros(2, dtype=torch.float64))
