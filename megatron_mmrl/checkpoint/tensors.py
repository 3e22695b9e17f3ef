"""Named tensors in one safetensors file, written one at a time: no copy of the whole, and no pickle anywhere.

The layout is that of the safetensors format: header length (8 bytes, little endian), header (JSON), data. The library's
own writer wants all tensors in host memory at once and refuses views of one buffer, which is what Megatron's
parameters are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mmrl.checkpoint.manifest import CheckpointError
from megatron_mmrl.models.file_tensor import DTYPE_OF_CODE

_CODES = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_ALIGNMENT = 8  # data starts at a multiple, as the format asks


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], about: Mapping[str, str]) -> bytes:
    """What stands before the data of tensors (name, dtype, shape) that follow each other in this order.

    Args:
        about: free text by key, part of the file; may be empty.

    Raises:
        KeyError: a dtype that is not in the table above.
    """
    header: dict[str, object] = {"__metadata__": dict(about)} if about else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` in the given order. Raises KeyError for a dtype that is not in the table above."""
    with file.open("wb") as stream:
        stream.write(encode_header(((name, t.dtype, tuple(t.shape)) for name, t in tensors.items()), {}))
        for tensor in tensors.values():
            write_data(stream, tensor)


def write_data(stream: BinaryIO, tensor: Tensor) -> None:
    """Append the numbers of one tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    stream.write(flat.view(torch.uint8).numpy().data)


class TensorFile:
    """An open file of named tensors; reads only what is asked for."""

    def __init__(self, file: Path, handle: safe_open) -> None:
        self._file, self._handle = file, handle
        self.names = frozenset(handle.keys())

    def read(self, name: str) -> Tensor:
        """A tensor on the host. Raises CheckpointError when the file has none of that name."""
        if name not in self.names:
            raise CheckpointError(f"{self._file} has no tensor {name}; it was written for another model")
        return self._handle.get_tensor(name)

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Overwrite ``target``. Raises CheckpointError when shape or dtype differ."""
        stored = self.read(name)
        if (stored.shape, stored.dtype) != (target.shape, target.dtype):
            raise CheckpointError(
                f"{name} in {self._file} is {stored.dtype} {tuple(stored.shape)}, "
                f"the model's is {target.dtype} {tuple(target.shape)}"
            )
        target.copy_(stored)


@contextmanager
def open_tensors(file: Path) -> Iterator[TensorFile]:
    """Raises CheckpointError: no such file, or not a safetensors file."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    with handle as opened:
        yield TensorFile(file, opened)
