"""Whether all ranks see one and the same directory and can write there."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from megatron_mmrl.checkpoint.output_dir import LOG_DIR
from megatron_mmrl.parallel.collectives import Collectives


def shared_problem(output_dir: Path, exchange: Collectives) -> str:
    """What is wrong with ``output_dir`` as this rank sees it; empty: nothing. Collective; leaves nothing behind.

    Rank 0 writes a file with a random token, every rank reads it and writes one of its own, and rank 0 reads those.
    """
    token = exchange.broadcast(secrets.token_hex(8) if exchange.rank == 0 else None)
    directory = output_dir / LOG_DIR / f".rollcall-{token}"
    made = _make(directory) if exchange.rank == 0 else []
    first = exchange.broadcast(_write(directory, 0, token) if exchange.rank == 0 else None)
    if first:
        return first if exchange.rank == 0 else ""
    written = "" if exchange.rank == 0 else _read(directory, 0, token) or _write(directory, exchange.rank, token)
    problems = exchange.all_gather(written)
    unseen = {}
    if exchange.rank == 0:
        unseen = {rank: _read(directory, rank, token) for rank, problem in enumerate(problems) if not problem}
        shutil.rmtree(directory, ignore_errors=True)
        for parent in made:
            _remove_if_empty(parent)
    unseen = exchange.broadcast(unseen)
    return written or unseen.get(exchange.rank, "")


def _make(directory: Path) -> list[Path]:
    """Make ``directory``; returns the parents that were made with it, innermost first."""
    missing = [parent for parent in directory.parents if not parent.exists()]
    try:
        directory.mkdir(parents=True)
    except OSError:  # writing into it will say so
        return []
    return missing


def _write(directory: Path, rank: int, token: str) -> str:
    try:
        (directory / str(rank)).write_text(token)
    except OSError as error:
        return f"rank {rank} cannot write there ({error.strerror})"
    return ""


def _read(directory: Path, rank: int, token: str) -> str:
    try:
        found = (directory / str(rank)).read_text()
    except OSError as error:
        return f"what rank {rank} wrote is not there ({error.strerror})"
    return "" if found == token else f"what rank {rank} wrote there is not what is read"


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
