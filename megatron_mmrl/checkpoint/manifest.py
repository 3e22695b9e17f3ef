"""What makes a checkpoint whole: a manifest of its files, with their sizes and hashes. Loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"  # layout, random generators and the caller's own facts
FORMAT = 1
_CHUNK_BYTES = 16 << 20


class CheckpointError(RuntimeError):
    """A checkpoint is not whole, was changed, or does not belong to this run's layout or model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint. The hash tells damage, not intent: it is no signature."""

    size_bytes: int
    xxh3_128: str  # hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of ``manifest.json``, which is written last."""

    step: int
    world_size: int  # ranks that wrote it
    files: Mapping[str, FileEntry]  # path below the checkpoint, with forward slashes

    def write(self, directory: Path) -> None:
        text = json.dumps({"format": FORMAT} | asdict(self), indent=1, sort_keys=True)
        (directory / MANIFEST_FILE).write_text(text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises CheckpointError: no manifest there, or not one of this format."""
        file = directory / MANIFEST_FILE
        try:
            raw = json.loads(file.read_text())
            if raw["format"] != FORMAT:
                raise CheckpointError(f"{file} has format {raw['format']}, this program reads {FORMAT}")
            files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            return cls(step=int(raw["step"]), world_size=int(raw["world_size"]), files=files)
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory} has no {MANIFEST_FILE}: it was never finished") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error!r}") from error


def check_sizes(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there at their full size. Raises CheckpointError."""
    manifest = Manifest.read(directory)
    for name, entry in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory} lacks {name}")
        if file.stat().st_size != entry.size_bytes:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {entry.size_bytes}")
    return manifest


def describe(file: Path) -> FileEntry:
    """Size and hash of a file."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size_bytes=size, xxh3_128=digest.hexdigest())


def list_files(directory: Path) -> list[str]:
    """Paths of all files below ``directory``, sorted, with forward slashes."""
    return sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())


def fsync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
