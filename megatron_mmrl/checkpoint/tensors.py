"""Named tensors in one safetensors file, written one at a time: no copy of the whole, and no pickle anywhere.

The layout is that of the safetensors format: header length (8 bytes, little endian), header (JSON), data. The library's
own writer wants all tensors in host memory at once and refuses views of one buffer, which is what Megatron's
parameters are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mmrl.checkpoint.manifest import CheckpointError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # data starts at a multiple, as the format asks


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` in the given order. Raises KeyError for a dtype that is not in the table above."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for tensor in tensors.values():
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
