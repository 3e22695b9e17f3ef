"""Checksums of weights that add up: the sum over a parameter is the sum over the rectangles it is put together from.

Every element is read as a 16- or 32-bit word and multiplied by an odd weight that depends on its place in the engine's
parameter; the sum is taken modulo 2^64:

    checksum = sum_ij word[i, j] * row_weight[i] * column_weight[j]  (mod 2^64)

An odd factor loses no bit, so one flipped bit always changes the sum. Numbers that stand in the wrong place change it
unless 64 random bits happen to agree. Zeros, hence padding, add nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.geometry import as_matrix

_WORDS = {2: torch.int16, 4: torch.int32}  # bytes of an element -> how it is read
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements that are widened to 64 bits at a time: in a cache, on a GPU
_MASK = (1 << 64) - 1


def checksum(values: Tensor, *, top: int = 0, left: int = 0) -> Tensor:
    """What ``values`` add to the checksum of the parameter in which they stand at row ``top``, column ``left``.

    Args:
        values: any shape, read as the matrix [first dimension, the others]; elements of 2 or 4 bytes.

    Returns:
        int64 scalar on the device of ``values``; the sum of several, which may wrap around, is that of all of them.

    Raises:
        ValueError: elements of another size.
    """
    require(
        values.element_size() in _WORDS,
        f"a checksum reads elements of {sorted(_WORDS)} bytes, not of {values.element_size()} ({values.dtype})",
    )
    rows, columns = as_matrix(tuple(values.shape))
    words = values.detach().reshape(rows, columns).view(_WORDS[values.element_size()])
    across = _weights(left, columns, 1, words.device)
    down = _weights(top, rows, 2, words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    height = max(1, _CHUNK[words.device.type] // max(1, columns))
    for first in range(0, rows, height):
        part = words[first : first + height].to(torch.int64)
        total += (part.mul_(across).sum(dim=1) * down[first : first + height]).sum()
    return total


def as_number(total: Tensor | int) -> int:
    """A checksum, or a sum of several, as a number in [0, 2^64)."""
    return int(total) & _MASK


@functools.lru_cache(maxsize=256)  # a model has few distinct sizes
def _weights(first: int, count: int, salt: int, device: torch.device) -> Tensor:
    """Odd numbers for positions [first, first + count), [count] int64: splitmix64 (Steele et al. 2014) of each."""
    value = (torch.arange(first, first + count, device=device) + 1) * _signed(0x9E3779B97F4A7C15) + salt
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return (value ^ _shifted(value, 31)) | 1


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return number - (1 << 64) if number >> 63 else number
