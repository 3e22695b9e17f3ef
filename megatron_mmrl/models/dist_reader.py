"""Reads a Megatron distributed checkpoint: any box of any global tensor, and no more than that."""

from __future__ import annotations

import io
import os
import pickle
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_mmrl.config.checks import require
from megatron_mmrl.models.dist_metadata import ChunkPlace, TensorPlaces, checkpoint_dir, read_metadata
from megatron_mmrl.models.file_tensor import FileTensor

Box = Sequence[tuple[int, int]]
"""(first, end) in each dimension."""


class DistReader:
    """The global tensors of a checkpoint.

    Args:
        path: a checkpoint, or a directory of Megatron-LM whose latest checkpoint is meant.

    Raises:
        ValueError: no distributed checkpoint there, or its metadata cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = checkpoint_dir(path)
        self._files = _Files(self.path)
        self._tensors = {
            key: GlobalTensorReader(key, places, self._files) for key, places in read_metadata(self.path).items()
        }

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def __getitem__(self, key: str) -> GlobalTensorReader:
        require(key in self, f"{self.path} has no tensor {key}; it holds {len(self._tensors)} others")
        return self._tensors[key]


class GlobalTensorReader:
    """One named tensor, whose boxes can be read."""

    def __init__(self, key: str, places: TensorPlaces, files: _Files) -> None:
        self.key, self.shape, self.dtype = key, places.shape, places.dtype
        self._chunks, self._files = places.chunks, files
        self._opened: dict[ChunkPlace, FileTensor] = {}

    def files(self, layer: int | None) -> list[Path]:
        """The files that hold it, or a layer of it."""
        return sorted({self._files.directory / chunk.file for chunk in self._chunks_of(layer)})

    def read_into(self, target: Tensor, layer: int | None, box: Box) -> None:
        """Fill the contiguous ``target``.

        Args:
            layer: index along the first dimension, which ``box`` then leaves out; None: not stacked.

        Raises:
            ValueError: a part of the box is in no chunk, or a file is not whole.
        """
        wanted = [*([] if layer is None else [(layer, layer + 1)]), *box]
        target = target.view([end - first for first, end in wanted])
        found = sum(self._copy_overlap(target, wanted, chunk) for chunk in self._chunks_of(layer))
        require(
            found == target.numel(),
            f"{self._files.directory}: chunks of {self.key} hold {found} of the {target.numel()} numbers in {wanted}",
        )

    def _chunks_of(self, layer: int | None) -> Sequence[ChunkPlace]:
        return self._chunks if layer is None else self._by_layer.get(layer, ())

    @cached_property
    def _by_layer(self) -> dict[int, list[ChunkPlace]]:
        found: dict[int, list[ChunkPlace]] = defaultdict(list)
        for chunk in self._chunks:
            for layer in range(chunk.start[0], chunk.start[0] + chunk.shape[0]):
                found[layer].append(chunk)
        return found

    def _copy_overlap(self, target: Tensor, wanted: Box, chunk: ChunkPlace) -> int:
        """Read what ``chunk`` has of the box; returns how many numbers that was."""
        common = [
            (max(first, begin), min(end, begin + size))
            for (first, end), begin, size in zip(wanted, chunk.start, chunk.shape, strict=True)
        ]
        if any(first >= end for first, end in common):
            return 0
        part = target[tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(common, wanted, strict=True))]
        inside = tuple(slice(a - begin, b - begin) for (a, b), begin in zip(common, chunk.start, strict=True))
        if chunk not in self._opened:
            self._opened[chunk] = self._files.open_chunk(self.key, self.dtype, chunk)
        if part.is_contiguous():
            self._opened[chunk].read_into(part, inside)
        else:
            part.copy_(self._opened[chunk][inside])
        return part.numel()


class _Files:
    """The files of a checkpoint, each opened once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._streams: dict[str, io.FileIO] = {}

    def open_chunk(self, key: str, dtype: torch.dtype, chunk: ChunkPlace) -> FileTensor:
        """Find the numbers of a chunk. Raises ValueError: the file is missing, cut off or holds something else."""
        name = f"tensor {key}, chunk at {list(chunk.start)} in {self.directory / chunk.file}"
        stream = self._stream(chunk.file)
        end, size = chunk.offset_bytes + chunk.length_bytes, os.fstat(stream.fileno()).st_size
        require(end <= size, f"{name} ends at byte {end} of {size}: the file is cut off")
        try:
            with FakeTensorMode():  # reads the archive's table of contents, not its numbers
                tensor = torch.load(
                    _create_file_view(stream, chunk.offset_bytes, chunk.length_bytes), weights_only=True
                )
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        require(
            isinstance(tensor, Tensor) and tensor.shape == chunk.shape and tensor.dtype == dtype,
            f"{name} should be {dtype} of shape {chunk.shape}, but holds {tensor}",
        )
        require(tensor.is_contiguous(), f"{name} has strides {tensor.stride()}; only row-major chunks can be read")
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * dtype.itemsize
        return FileTensor(stream, chunk.offset_bytes + begin, dtype, chunk.shape)

    def _stream(self, name: str) -> io.FileIO:
        if name not in self._streams:
            file = self.directory / name
            require(file.is_file(), f"{file} is missing, although the checkpoint's metadata names it")
            self._streams[name] = io.FileIO(file)
        return self._streams[name]
