"""A run that hangs ends, and says who hung and where; one that is only slow does not."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from megatron_mmrl.cluster.failure import FAILURE_DIR, Failure, death, first_cause, read_failures
from tests.dist.launch import _fork_server, _torchrun_env

TIMEOUT_S = 3.0


@dataclass
class Ranks:
    """Ranks that were started, and what they wrote."""

    processes: list[BaseProcess]
    directory: Path

    def wait(self, ranks: list[int], timeout_s: float = 40.0) -> list[int | None]:
        deadline = time.monotonic() + timeout_s
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def cause(self) -> Failure:
        return first_cause(read_failures(self.directory))

    def stacks(self, rank: int) -> str:
        return (self.directory / f"stacks-rank{rank}.txt").read_text()

    def last_line(self, rank: int) -> str:
        return (self.directory / f"output{rank}").read_text().splitlines()[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[BaseProcess] = []

    def start(world_size: int, *args: object, timeout_s: float = TIMEOUT_S) -> Ranks:
        env = {**_torchrun_env(world_size), FAILURE_DIR: str(tmp_path)}
        context = _fork_server()
        ranks = [context.Process(target=_rank, args=(rank, env, timeout_s, *args)) for rank in range(world_size)]
        started.extend(ranks)
        for process in ranks:
            process.start()
        return Ranks(ranks, tmp_path)

    yield start
    for process in started:
        process.kill()
        process.join()


def _rank(rank: int, env: Mapping[str, str], timeout_s: float, work: Callable[..., None], *args: object) -> None:
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    output = os.open(Path(env[FAILURE_DIR]) / f"output{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_mmrl.cluster.watchdog import watched

    if int(env["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    with watched(timeout_s, Path(env[FAILURE_DIR])):
        work(*args)
    os._exit(0)


def _steps(hang: Callable[[], None], culprit: int) -> None:
    """Steps in which all ranks meet; in the third one of them hangs."""
    import torch.distributed as dist

    from megatron_mmrl import pulse

    for step in range(1, 1000):
        pulse.at_step(step)
        with pulse.phase("bake"):
            time.sleep(0.05)
            if step == 3 and dist.get_rank() == culprit:
                time.sleep(1.0)  # for its last words
                hang()
        with pulse.phase("eat"):
            dist.barrier()


def loop_for_ever() -> None:
    while True:
        pass


def hold_the_lock() -> None:
    re.fullmatch("(a+)+b", "a" * 60)  # exponential, in C


def stop_the_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("hang", "culprit", "signs"),
    [
        (loop_for_ever, 1, ("no progress for", "(loop_for_ever)")),
        (hold_the_lock, 2, ("has not answered for",)),
        (stop_the_process, 1, ("has not answered for",)),
        (stop_the_process, 0, ("has not answered for",)),  # and with it the store at which the ranks met
    ],
    ids=["Python loop", "C call", "stopped", "store's host stopped"],
)
def test_a_hang_ends_with_the_rank_that_hangs(
    start: Callable[..., Ranks], hang: Callable[[], None], culprit: int, signs: tuple[str, ...]
) -> None:
    ranks = start(3, _steps, hang, culprit)
    others = [rank for rank in range(3) if rank != culprit]
    assert ranks.wait(others) == [1, 1]
    cause = ranks.cause()
    assert (cause.rank, cause.type) == (culprit, "StalledError")
    for sign in (*signs, "in phase bake of step 3", f"on {socket.gethostname()}", str(ranks.processes[culprit].pid)):
        assert sign in cause.message
    for rank in others:
        assert "_steps" in ranks.stacks(rank)
        assert "barrier" in ranks.stacks(rank)
        assert ranks.last_line(rank).startswith(f"error: rank {culprit}: StalledError: ")
        assert re.search(r"rank.* waits for others, in phase eat, step 3", ranks.cause().traceback)


def test_a_rank_that_holds_the_lock_leaves_its_stack_and_ends_even_if_nobody_else_is_there(
    start: Callable[..., Ranks],
) -> None:
    ranks = start(1, hold_the_lock, timeout_s=1.0)
    assert ranks.wait([0]) == [-signal.SIGALRM]
    assert "hold_the_lock" in ranks.stacks(0)
    assert "stacks-rank0.txt" in death(0, -signal.SIGALRM).message


def _slow() -> None:
    import torch.distributed as dist

    from megatron_mmrl import pulse

    with pulse.phase("knead"):
        for _ in range(4):
            if dist.get_rank() == 0:
                time.sleep(0.9)
                pulse.beat()
    with pulse.phase("prove"):
        dist.barrier()
    with pulse.phase("bake"), pulse.limited_wait(2.0):
        if dist.get_rank() == 1:
            time.sleep(TIMEOUT_S + 0.5)
    with pulse.phase("eat"):
        dist.barrier()


def test_slow_work_and_waits_that_limit_themselves_are_no_stall(start: Callable[..., Ranks]) -> None:
    ranks = start(2, _slow)
    assert ranks.wait([0, 1]) == [0, 0]
    assert sorted(path.name for path in ranks.directory.iterdir()) == ["output0", "output1"]


MODULE = """
import os, signal, time
from pathlib import Path
import torch.distributed as dist
from megatron_mmrl import pulse
from megatron_mmrl.cluster.failure import run_rank
from megatron_mmrl.cluster.watchdog import watched
def main():
    dist.init_process_group("gloo")
    with watched(4, Path("logs")), pulse.phase("bake"):
        dist.barrier()
        if dist.get_rank() == 0:
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()
run_rank(main)
"""


def test_the_launcher_ends_all_ranks_and_its_last_line_is_the_cause(tmp_path: Path) -> None:
    (tmp_path / "baking.py").write_text(MODULE)
    code = "import sys; from pathlib import Path; from megatron_mmrl.cluster.local import run_ranks; "
    code += "sys.exit(run_ranks('baking', [], 2, Path('logs')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: rank 0: StalledError: has not answered for "), done.stderr
    assert "in phase bake of step 0" in done.stderr
