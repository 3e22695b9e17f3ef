"""However a run ends, every process it started ends too, in seconds, and the last line says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_mmrl.cluster.stop import EXIT_REQUEUE

HERE = Path(__file__).parent
DRIVER = """
import sys
from pathlib import Path
from megatron_mmrl.cluster.local import run_ranks
directory, action, actor = sys.argv[1:]
logs = Path(directory) / "logs"
sys.exit(run_ranks("launcher_dummy", [directory, action, actor], 2, logs, can_save=action == "save"))
"""
NAMES = ("rank0", "rank1", "engine0", "engine1")


@dataclass
class Run:
    """A launcher with two ranks and two engines."""

    launcher: subprocess.Popen[str]
    directory: Path

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.directory.glob("ready-*"))) < 2:
            assert self.launcher.poll() is None, self.launcher.communicate()
            assert time.monotonic() < deadline, "the ranks did not come up"
            time.sleep(0.02)

    def pids(self) -> dict[str, int]:
        return {name: int((self.directory / f"pid-{name}").read_text()) for name in NAMES}

    def finish(self) -> tuple[int, str, list[str]]:
        """Exit code, what the terminal got from rank 0, and the lines of standard error."""
        out, err = self.launcher.communicate(timeout=20)
        return self.launcher.returncode, out, err.splitlines()

    def survivors_now(self) -> list[str]:
        return [name for name, pid in self.pids().items() if is_running(pid)]

    def survivors(self) -> list[str]:
        """Who is still there 10 s after the launcher ended."""
        deadline = time.monotonic() + 10
        while (left := self.survivors_now()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # an init that reaps nobody is not our affair
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start(tmp_path: Path):
    runs: list[Run] = []

    def start(action: str, actor: int = 1) -> Run:
        command = [sys.executable, "-c", DRIVER, str(tmp_path), action, str(actor)]
        launcher = subprocess.Popen(
            command, cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        runs.append(Run(launcher, tmp_path))
        return runs[-1]

    yield start
    for run in runs:
        if run.launcher.poll() is None:
            run.launcher.kill()
            run.launcher.communicate()


@pytest.mark.parametrize(
    ("action", "actor", "last_line", "exit_code"),
    [
        ("raise", 1, "error: rank 1: ValueError: reward/mean is nan", 1),
        ("deaf", 0, "error: rank 0: ValueError: reward/mean is nan", 1),
        ("exit", 1, "error: rank 1: exited with code 7", 1),
        ("slow_cleanup", 0, "error: rank 0: ValueError: the cause", 1),
        ("lost_peer", 1, "error: rank 1: killed by SIGKILL", 1),
    ],
)
def test_the_first_failure_is_the_last_line(
    start: Callable[..., Run], action: str, actor: int, last_line: str, exit_code: int
) -> None:
    run = start(action, actor)
    code, _, err = run.finish()
    assert (code, err[-1]) == (exit_code, last_line)
    assert run.survivors() == []


def test_a_run_that_ends_well_is_silent_and_its_engines_end_too(start: Callable[..., Run]) -> None:
    run = start("finish")
    assert run.finish() == (0, "rank 0 is up\n", [])
    assert run.survivors() == []
    assert (run.directory / "logs" / "rank1.log").read_text() == "rank 1 is up\n"


def test_a_traceback_is_in_the_log_and_not_on_the_terminal(start: Callable[..., Run]) -> None:
    run = start("raise", 0)
    _, out, err = run.finish()
    assert out == "rank 0 is up\n"
    assert err == [
        f"logs of the ranks: {run.directory}/logs/rank*.log",
        "error: rank 0: ValueError: reward/mean is nan",
    ]
    assert "Traceback (most recent call last)" in (run.directory / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_everything(start: Callable[..., Run], number: signal.Signals, exit_code: int) -> None:
    run = start("wait")
    run.wait_until_up()
    os.killpg(run.launcher.pid, number)  # as a terminal does: to the whole foreground process group
    code, _, err = run.finish()
    assert (code, err[-1]) == (exit_code, f"interrupted ({number.name})")
    assert run.survivors() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_reaches_ranks_that_do_not_listen_yet(start: Callable[..., Run], number: signal.Signals) -> None:
    run = start("save")
    run.wait_until_up()
    run.launcher.send_signal(number)
    time.sleep(0.5)  # the launcher has passed it on by now; a rank that was not protected would be dead
    assert run.survivors_now() == list(NAMES)
    (run.directory / "listen").touch()
    (run.directory / "step-ends").touch()
    code, _, err = run.finish()
    assert (code, len(err)) == (EXIT_REQUEUE, 1), err
    assert "saving at the end of this step" in err[0]
    assert run.survivors() == []


def test_a_second_request_ends_a_run_that_does_not_come_to_its_end(start: Callable[..., Run]) -> None:
    run = start("save")
    run.wait_until_up()
    (run.directory / "listen").touch()
    for _ in range(2):
        run.launcher.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    code, _, err = run.finish()
    assert (code, err[-1]) == (143, "interrupted (SIGTERM)")
    assert run.survivors() == []


def test_a_killed_rank_is_the_cause(start: Callable[..., Run]) -> None:
    run = start("wait")
    run.wait_until_up()
    os.kill(run.pids()["rank0"], signal.SIGKILL)
    code, _, err = run.finish()
    assert (code, err[-1]) == (1, "error: rank 0: killed by SIGKILL")
    assert run.survivors() == []


def test_sigkill_of_the_launcher_ends_ranks_and_engines(start: Callable[..., Run]) -> None:
    run = start("wait")
    run.wait_until_up()
    run.launcher.kill()
    run.launcher.communicate(timeout=20)
    assert run.survivors() == []


def test_gloo_ranks_meet_on_loopback_only(tmp_path: Path) -> None:
    (tmp_path / "meeting.py").write_text(
        "import os, psutil, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor([float(dist.get_rank() + 1)])\n"
        "dist.all_reduce(total)\n"
        "family = [psutil.Process(), psutil.Process().parent()]\n"
        "listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == 'LISTEN'}\n"
        "dist.barrier()\n"
        "if dist.get_rank() == 0:\n"
        "    print(total.item(), *sorted(listening))\n"
        "dist.destroy_process_group()\n"
    )
    code = "import sys; from pathlib import Path; from megatron_mmrl.cluster.local import run_ranks; "
    code += "sys.exit(run_ranks('meeting', [], 2, Path('logs')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "3.0 127.0.0.1\n"), done.stderr
