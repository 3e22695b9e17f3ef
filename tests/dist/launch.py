"""Start gloo ranks for a test: one process per rank, results and failures come back to the caller.

Ranks are forked from one server process that has imported the heavy packages (``preload.py``), so that the first call
of a test session takes some seconds and every later one a fraction of that.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest


class RankFailedError(AssertionError):
    """A rank raised, died or did not finish in time; holds its traceback."""


def run_ranks(
    target: Callable[..., object],
    world_size: int,
    *args: object,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list:
    """Call ``target(*args)`` in ``world_size`` new processes with torchrun's environment set.

    ``target`` must be a module-level function (it is imported again in each process); it reads its rank from
    ``RANK``, and has one thread. Returns what each rank returned, in rank order.

    Raises:
        RankFailedError: with the traceback of the first rank that failed; the other ranks are ended.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        shared_env = {**_torchrun_env(world_size), **(env or {})}
        context = _fork_server()
        processes = [
            context.Process(target=_rank_main, args=(target, args, rank, shared_env, out)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, out, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((out / f"result{rank}").read_bytes()) for rank in range(world_size)]


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preload"])
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", root, prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")  # read once, when the server loads torch
        forkserver.ensure_running()
    return context


def _torchrun_env(world_size: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def _rank_main(
    target: Callable[..., object], args: tuple[object, ...], rank: int, env: Mapping[str, str], out: Path
) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        result = target(*args)
        part = out / f"part{rank}"
        part.write_bytes(pickle.dumps(result))
        part.rename(out / f"result{rank}")
    except BaseException:  # noqa: BLE001  # carried to the parent, which raises
        (out / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _wait(processes: list[BaseProcess], out: Path, deadline: float) -> None:
    while alive := [rank for rank, process in enumerate(processes) if process.is_alive()]:
        _raise_failures(processes, out)
        if time.monotonic() > deadline:
            raise RankFailedError(f"ranks {alive} did not finish in time")
        processes[alive[0]].join(0.05)
    _raise_failures(processes, out)


def _raise_failures(processes: list[BaseProcess], out: Path) -> None:
    errors = sorted(out.glob("error*"))
    if errors:
        raise RankFailedError("\n".join(f"{file.name}:\n{file.read_text()}" for file in errors))
    for rank, process in enumerate(processes):
        if not process.is_alive() and not (out / f"result{rank}").exists():
            raise RankFailedError(f"rank {rank} ended with exit code {process.exitcode} and no result")
