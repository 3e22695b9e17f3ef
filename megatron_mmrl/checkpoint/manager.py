"""Checkpoints that appear whole or not at all, even if the machine stops in the middle.

All ranks write into ``step_N.tmp-TOKEN``. When every file is on disk and listed in the manifest, one rename makes it
``step_N``; whatever carries ``.tmp-`` in its name is a leftover and is removed at the next start.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_mmrl import pulse
from megatron_mmrl.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointError,
    FileEntry,
    Manifest,
    check_sizes,
    describe,
    fsync,
    list_files,
)

if TYPE_CHECKING:
    from megatron_mmrl.parallel.collectives import Collectives

T = TypeVar("T")
_NAME = re.compile(r"step_(\d+)")
_log = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of one run, below ``root`` on a file system that all ranks share. Every method is collective."""

    def __init__(self, root: Path, keep: int, collectives: Collectives) -> None:
        """Make ``root`` and remove what a killed run left half done.

        Args:
            root: usually ``run.output_dir``/checkpoints.
            keep: older ones beyond so many are deleted; 0 keeps all.
        """
        self._root, self._keep, self._collectives = root, keep, collectives
        if collectives.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob("step_*.tmp-*"):
                shutil.rmtree(leftover)
        collectives.barrier()

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Keep what all ranks ``write`` into the given directory as the checkpoint of ``step``.

        A whole checkpoint of this step is left as it is; a damaged one is replaced.

        Raises:
            CheckpointError: nothing was written.
        """
        target = self._root / f"step_{step}"
        parts = self._collectives.broadcast(self._begin(target) if self._collectives.rank == 0 else None, src=0)
        if parts is None:
            return target
        write(parts)
        self._collectives.barrier()
        files = self._secure(parts)
        if self._collectives.rank == 0:
            Manifest(step=step, world_size=self._collectives.world_size, files=files).write(parts)
            _publish(parts, target)
            _prune(self._root, self._keep)
        self._collectives.barrier()
        return target

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; damaged ones are passed over with a warning."""
        newest = None
        if self._collectives.rank == 0:
            whole = whole_checkpoints(self._root, warn=True)
            newest = whole[-1] if whole else None
        return self._collectives.broadcast(newest, src=0)

    def load(self, path: Path, read: Callable[[Path], T]) -> T:
        """What ``read`` makes of a checkpoint, after every file's hash was compared (each by one rank).

        Raises:
            CheckpointError: on every rank, when a file is missing or is not what was written.
        """
        problems = self._collectives.all_gather(self._problem_in_my_share(path))
        for problem in filter(None, problems):
            raise CheckpointError(f"{problem}; remove {path} to continue from an earlier checkpoint")
        return read(path)

    def _begin(self, target: Path) -> Path | None:
        """A new directory to write into; None when the checkpoint is there already."""
        if target.exists() and _damage(target) is None:
            return None
        parts = _temporary(target)
        parts.mkdir()
        return parts

    def _secure(self, parts: Path) -> dict[str, FileEntry]:
        """Flush and hash all files, each by one rank."""
        collectives = self._collectives
        names = collectives.broadcast(list_files(parts) if collectives.rank == 0 else None, src=0)
        if not names:
            raise CheckpointError(f"no rank wrote anything into {parts}")
        mine = {}
        for name in names[collectives.rank :: collectives.world_size]:
            pulse.beat()
            fsync(parts / name)
            mine[name] = describe(parts / name)
        return {name: entry for share in collectives.all_gather(mine) for name, entry in share.items()}

    def _problem_in_my_share(self, path: Path) -> str | None:
        try:
            files = check_sizes(path).files
        except CheckpointError as error:
            return str(error)
        for name in sorted(files)[self._collectives.rank :: self._collectives.world_size]:
            pulse.beat()
            found = describe(path / name)
            if found != files[name]:
                return f"{path / name} has hash {found.xxh3_128}, its manifest says {files[name].xxh3_128}"
        return None


def whole_checkpoints(root: Path, *, warn: bool = False) -> list[Path]:
    """Checkpoints below ``root`` whose files are all there at full size, oldest first."""
    steps = sorted((int(match[1]), path) for path in root.glob("step_*") if (match := _NAME.fullmatch(path.name)))
    result = []
    for _, path in steps:
        damage = _damage(path)
        if damage is None:
            result.append(path)
        elif warn:
            _log.warning("checkpoint %s is passed over: %s", path.name, damage)
    return result


def _damage(path: Path) -> str | None:
    try:
        check_sizes(path)
    except CheckpointError as error:
        return str(error)
    return None


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")


def _publish(parts: Path, target: Path) -> None:
    """The one moment at which the checkpoint comes into being."""
    for directory in (*(path for path in parts.rglob("*") if path.is_dir()), parts / MANIFEST_FILE, parts):
        fsync(directory)
    if target.exists():
        _remove(target)
    os.rename(parts, target)
    fsync(target.parent)


def _prune(root: Path, keep: int) -> None:
    """Delete what is older than the ``keep`` newest whole checkpoints."""
    whole = whole_checkpoints(root)
    if keep and len(whole) > keep:
        oldest_kept = int(whole[-keep].name.removeprefix("step_"))
        for path in root.glob("step_*"):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) < oldest_kept:
                _remove(path)


def _remove(path: Path) -> None:
    """Rename first: a half deleted checkpoint must not look like a damaged one."""
    doomed = _temporary(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
