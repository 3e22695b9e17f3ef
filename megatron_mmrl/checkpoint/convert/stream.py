"""What both directions share while numbers flow: memory used again, one look ahead, a check of every number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.models.hf_io import TensorReader

T = TypeVar("T")
Progress = Callable[[str, int], None]
"""(what was done, bytes that it wrote)."""
BLOCK_BYTES = 32 << 20
"""Tensors that are not stored in chunks go through in blocks of rows of this size."""
_END = object()


class Buffer:
    """Memory that is used again and again: new pages cost more time than reading a file into them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor with arbitrary numbers; it overwrites what was taken before."""
        shape = tuple(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if len(self._memory) < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # before the larger one: not both at a time
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype).view(shape)


def blocks(shape: tuple[int, ...], nbytes: int) -> Iterator[slice]:
    """Rows of a tensor of ``nbytes``, about ``BLOCK_BYTES`` at a time."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_BYTES * rows // max(1, nbytes))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite; one pass without a temporary (both show in the extremes)."""
    if not values.is_floating_point() or not values.numel():
        return True
    low, high = values.aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(values: Tensor, reader: TensorReader, name: str) -> None:
    """Raises ValueError with the tensor and its file."""
    require(is_finite(values), f"tensor {name} in {reader.file_of(name)} holds NaN or infinite numbers")


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; while the caller uses one, another thread makes the next (and no further one)."""
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, iterator, _END)
            yield item  # type: ignore[misc]
