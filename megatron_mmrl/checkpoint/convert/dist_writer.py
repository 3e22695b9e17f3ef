"""Writes a Megatron distributed checkpoint (``torch_dist``, the format of torch.distributed.checkpoint) as a stream.

One chunk is in memory at a time. torch's own ``FileSystemWriter`` asks for tensors one by one too, but keeps the last
one of every name until a file is closed (2.13.0): with unstacked names that is the whole model.

The format: ``__0_N.distcp`` files are chunks one after the other, each as ``torch.save`` writes it; ``.metadata`` says
where each chunk is and of which tensor; ``common.pt`` and ``metadata.json`` are Megatron's own.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mmrl.models.dist_metadata import CONFIG_FILE, METADATA_FILE

COMMON_FILE = "common.pt"
CHECKPOINT_VERSION = 3.0  # of Megatron-LM: queries, keys and values of a group lie together
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistWriter:
    """Files of a new checkpoint; complete when ``finish`` returns. Not flushed to the disk.

    Args:
        directory: an empty one.
        max_file_bytes: a file that has reached this size gets no further chunk.
    """

    def __init__(self, directory: Path, max_file_bytes: int) -> None:
        self._directory, self._max_file_bytes = directory, max_file_bytes
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._stream: BinaryIO | None = None
        self._num_files = 0

    def add_chunk(self, key: str, shape: tuple[int, ...], start: tuple[int, ...], chunk: Tensor) -> None:
        """Write one chunk of the global tensor ``key``.

        Args:
            shape: of the global tensor.
            start: where the chunk begins in it.
            chunk: contiguous, on the host, with as many dimensions as ``shape``.
        """
        offsets = torch.Size(start)
        entry = self._tensors.setdefault(
            key,
            TensorStorageMetadata(properties=TensorProperties(dtype=chunk.dtype), size=torch.Size(shape), chunks=[]),
        )
        index = MetadataIndex(key, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=chunk.shape))
        with self._place(index) as stream:
            _save(_own_storage(chunk), stream)

    def add_empty_object(self, key: str) -> None:
        """Write an object without content, as Megatron does for modules that have no state besides their weights."""
        self._objects[key] = BytesStorageMetadata()
        with self._place(MetadataIndex(key)) as stream:
            content = io.BytesIO()
            torch.save([None], content)
            stream.write(content.getbuffer())

    def finish(self, arguments: Mapping[str, Any]) -> None:
        """Write what makes the files a checkpoint.

        Args:
            arguments: Megatron-LM's command line arguments; it compares them with those of the run that loads.
        """
        self._close_file()
        metadata = Metadata(
            state_dict_metadata={**self._tensors, **self._objects},
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        namespace = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, **arguments)
        common = {"args": namespace, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0}
        torch.save(common, self._directory / COMMON_FILE)
        (self._directory / CONFIG_FILE).write_text(json.dumps(_CONFIG))
        with (self._directory / METADATA_FILE).open("wb") as stream:
            pickle.dump(metadata, stream)

    @contextmanager
    def _place(self, index: MetadataIndex) -> Iterator[BinaryIO]:
        """The file to write one item to; notes where it went."""
        stream = self._stream or self._open_file()
        begin = stream.tell()
        yield stream
        self._places[index] = _StorageInfo(Path(stream.name).name, begin, stream.tell() - begin)
        if stream.tell() >= self._max_file_bytes:
            self._close_file()

    def _open_file(self) -> BinaryIO:
        self._stream = (self._directory / f"__0_{self._num_files}.distcp").open("wb")
        self._num_files += 1
        return self._stream

    def _close_file(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _own_storage(tensor: Tensor) -> Tensor:
    """The same memory under a storage that ends with the tensor: ``torch.save`` writes storages, not tensors."""
    if not tensor.numel():
        return tensor.clone()
    raw = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return raw.view(tensor.dtype).view(tensor.shape)


def _save(tensor: Tensor, stream: BinaryIO) -> None:
    """``torch.save`` without checksums: torch never reads them, and computing them takes as long as writing the data.

    Raises:
        OSError: the disk is full, say.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch fails again when it ends its archive, which hides the cause
            raise error.__context__ from None
        raise
    finally:
        torch.serialization.set_crc32_options(checksums)
