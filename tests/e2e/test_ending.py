"""However a real run ends, all of its processes end in seconds, nothing listens, and the last line is the cause."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_mmrl.cluster.stop import EXIT_REQUEUE
from tests.e2e.run import SMALL, Run, command, environment, read_jsonl, train, untimed

SECONDS_TO_END = 15.0


def start(work_dir: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """A run that would last for ever, once its first step is done."""
    arguments = (f"run.output_dir=runs/{name}", *SMALL, "run.num_steps=1000", "run.save_every=0", *overrides)
    process = subprocess.Popen(
        command("train", *arguments),
        cwd=work_dir,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = work_dir / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step was done in time"
        time.sleep(0.05)
    return process


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)


def kill_engine(process: subprocess.Popen[str]) -> None:
    """End SGLang's scheduler, as a crash would."""
    engine = next(child for child in descendants(process) if "launch_server" in " ".join(child.cmdline()))
    worker = max(engine.children(recursive=True), key=lambda child: child.memory_info().rss)
    worker.kill()


@pytest.mark.parametrize(
    ("end", "last_line", "code"),
    [(interrupt, "interrupted (SIGINT)", 130), (kill_engine, "EngineDiedError", 1)],
    ids=["Ctrl-C", "dead engine"],
)
def test_everything_ends(
    work_dir: Path, end: Callable[[subprocess.Popen[str]], None], last_line: str, code: int
) -> None:
    process = start(work_dir, end.__name__, "rollout.max_engine_restarts=0")
    family = descendants(process)
    ports = [c.laddr.port for child in family for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(family) >= 5
    assert ports
    began = time.monotonic()
    end(process)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < SECONDS_TO_END
    assert process.returncode == code
    assert last_line in errors.strip().splitlines()[-1], errors
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert not listening & set(ports)


def test_asked_to_stop_a_run_saves_and_continues_as_if_it_had_not(work_dir: Path, golden_run: Run) -> None:
    process = start(work_dir, "asked")
    family = descendants(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, errors
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    path = work_dir / "runs" / "asked"
    last = read_jsonl(path / "metrics.jsonl")[-1]["step"]
    assert last < 5
    assert (path / "checkpoints" / f"step_{last:.0f}" / "manifest.json").exists()
    assert not (path / "hf").exists()
    run = train(work_dir, "asked", ("run.resume=auto",))
    assert untimed(run.rows) == untimed(golden_run.rows)


@pytest.mark.full
def test_a_stopped_rank_ends_the_run_and_is_named(work_dir: Path) -> None:
    process = start(work_dir, "suspended", "cluster.timeout_s=30")
    family = descendants(process)
    rank = [child for child in family if "megatron_mmrl.train" in " ".join(child.cmdline())][-1]
    rank.suspend()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("error: rank 1: StalledError: has not answered for"), errors
    assert "rank 0 on" in errors  # the table
    assert "all_gather" in (work_dir / "runs" / "suspended" / "logs" / "stacks-rank0.txt").read_text()
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
