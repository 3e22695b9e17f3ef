"""Where the chunks of a Megatron distributed checkpoint are: its ``.metadata``, read without trusting it.

The file is a pickle. It is read with a list of the classes that may stand in it, all of them records without behaviour.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_mmrl.config.checks import require
from megatron_mmrl.models.hf_io import TRACKER_FILE

METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"
RELEASE = "release"
"""What Megatron-LM calls a checkpoint that no training run wrote."""

_RECORDS = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
    # Megatron stores the plans of all ranks along with the rest.
    planner: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(module.__name__, name): getattr(module, name) for module, names in _RECORDS.items() for name in names},
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Paths of the machine that wrote it: kept as they are spelled, never used.
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
}


class _Unpickler(pickle.Unpickler):
    """Makes records and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint's metadata")
        return _ALLOWED[module, name]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlace:
    """A box of a global tensor, and the archive (as ``torch.save`` writes it) that holds its numbers."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlaces:
    """A global tensor and all its chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[ChunkPlace, ...]


def checkpoint_dir(path: Path) -> Path:
    """``path`` itself, or if it is a directory of Megatron-LM, the checkpoint that its tracker file names.

    Raises:
        ValueError: no distributed checkpoint there.
    """
    if not (path / METADATA_FILE).is_file() and (path / TRACKER_FILE).is_file():
        latest = (path / TRACKER_FILE).read_text().strip()
        require(latest == RELEASE or latest.isdigit(), f"{path / TRACKER_FILE} names no checkpoint: {latest[:40]!r}")
        path = path / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
    missing = [name for name in (METADATA_FILE, CONFIG_FILE) if not (path / name).is_file()]
    require(not missing, f"{path} is no Megatron distributed checkpoint: it has no {' and no '.join(missing)}")
    return path


def is_megatron(path: Path) -> bool:
    """Whether there is a Megatron checkpoint rather than one of Hugging Face."""
    return any((path / name).is_file() for name in (METADATA_FILE, TRACKER_FILE))


def read_metadata(directory: Path) -> Mapping[str, TensorPlaces]:
    """The global tensors of a checkpoint by name. Raises ValueError: not readable, or not what it should be."""
    file = directory / METADATA_FILE
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream).load()
        require(isinstance(content, Metadata), "it is not a checkpoint's metadata")
        return _tensors(content)
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}") from error


def _tensors(content: Metadata) -> dict[str, TensorPlaces]:
    places: dict[str, dict[torch.Size, Any]] = defaultdict(dict)
    for index, info in content.storage_data.items():
        require(Path(info.relative_path).name == info.relative_path, f"it names the file {info.relative_path}")
        places[index.fqn][index.offset] = info
    return {
        key: TensorPlaces(
            shape=tuple(entry.size),
            dtype=entry.properties.dtype,
            chunks=tuple(
                ChunkPlace(
                    start=tuple(chunk.offsets),
                    shape=tuple(chunk.sizes),
                    file=places[key][chunk.offsets].relative_path,
                    offset_bytes=places[key][chunk.offsets].offset,
                    length_bytes=places[key][chunk.offsets].length,
                )
                for chunk in entry.chunks
            ),
        )
        for key, entry in content.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
