"""Tensors that lie in files: only the bytes that are sliced are read, into memory of their own; nothing is mapped.

Mapped pages count as the process's memory until the kernel takes them back, and reading a cold file through a mapping
waits for one page after the other.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require

DTYPE_OF_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the safetensors format."""

_HEADER_LIMIT_BYTES = 100 << 20  # as in the format's own library
_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once


class FileTensor:
    """A row-major tensor at a place in an open file; sliced in steps of one.

    Raises:
        ValueError: on reading, the file ends too early.
    """

    def __init__(self, stream: io.FileIO, offset_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, dtype
        self._stream, self._offset = stream, offset_bytes

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Tensor:
        result = torch.empty([end - first for first, end in bounds(self.shape, key)], dtype=self.dtype)
        self.read_into(result, key)
        return result

    def read_into(self, target: Tensor, key: slice | tuple[slice, ...]) -> None:
        """Fill ``target``, which has the shape of the slice and this tensor's dtype, and is contiguous."""
        box = bounds(self.shape, key)
        strides = [math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize for dim in range(len(box))]
        cut = max((dim for dim, part in enumerate(box) if part != (0, self.shape[dim])), default=0)
        memory = target.reshape(-1).view(torch.uint8).numpy().data
        start = self._offset + sum(first * stride for (first, _), stride in zip(box, strides, strict=True))
        # Dimensions after the last one that is cut are whole: with it they are one run of bytes.
        outer = [
            range(0, (end - first) * stride, stride) for (first, end), stride in zip(box[:cut], strides, strict=False)
        ]
        run = len(memory) // max(1, math.prod(map(len, outer)))
        for number, steps in enumerate(itertools.product(*outer)):
            read_exactly(self._stream, memory[number * run : (number + 1) * run], start + sum(steps))


def bounds(shape: tuple[int, ...], key: slice | tuple[slice, ...]) -> list[tuple[int, int]]:
    """(first, end) in each dimension; those that ``key`` leaves out are whole."""
    keys = key if isinstance(key, tuple) else (key,)
    limits = [part.indices(size) for part, size in zip(keys, shape, strict=False)]
    return [(first, max(first, end)) for first, end, _ in limits] + [(0, size) for size in shape[len(keys) :]]


def read_exactly(stream: io.FileIO, target: memoryview, offset_bytes: int) -> None:
    """Fill ``target`` from ``offset_bytes`` on. Raises ValueError when the file ends before that."""
    done = 0
    while done < len(target):
        got = os.preadv(stream.fileno(), [target[done : done + _READ_BYTES]], offset_bytes + done)
        require(
            got > 0,
            f"{stream.name} ends after {offset_bytes + done} bytes, but {len(target)} bytes are expected from "
            f"{offset_bytes} on: the file is cut off",
        )
        done += got


def open_safetensors(file: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name, none of them read yet.

    Raises:
        ValueError: no such file, not of this format, or shorter than its header says.
    """
    try:
        stream = io.FileIO(file)
        header, data_start = _read_header(stream)
        return {
            name: _tensor(stream, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
        }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{file} cannot be read as safetensors: {reason}") from error


def _read_header(stream: io.FileIO) -> tuple[dict[str, Any], int]:
    prefix = bytearray(8)
    read_exactly(stream, memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    require(length <= _HEADER_LIMIT_BYTES, f"its header would have {length} bytes")
    text = bytearray(length)
    read_exactly(stream, memoryview(text), 8)
    return json.loads(text), 8 + length


def _tensor(stream: io.FileIO, name: str, entry: dict[str, Any], data_start: int) -> FileTensor:
    begin, end = entry["data_offsets"]
    require(entry["dtype"] in DTYPE_OF_CODE, f"{name} has dtype {entry['dtype']}; known: {sorted(DTYPE_OF_CODE)}")
    tensor = FileTensor(stream, data_start + begin, DTYPE_OF_CODE[entry["dtype"]], tuple(entry["shape"]))
    require(
        end - begin == tensor.nbytes and begin >= 0,
        f"{name} of shape {tensor.shape} needs {tensor.nbytes} bytes, its place {begin} to {end} has {end - begin}",
    )
    size = os.fstat(stream.fileno()).st_size
    require(data_start + end <= size, f"{name} ends at byte {data_start + end} of {size}: the file is cut off")
    return tensor
