"""Runs on a real Ray cluster: the numbers of one host, nodes that are lost, requests to stop, and who may join."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.ray_nodes import RayCluster, processes_in, ray_cluster, wait_until
from tests.e2e.run import CONFIG, SMALL, TWO_RANKS, Run, untimed

FIRST, SECOND, SPARE, LATE = "127.0.0.11", "127.0.0.12", "127.0.0.13", "127.0.0.14"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes for ranks and one that only has CPUs to spare."""
    with ray_cluster({FIRST: 2, SECOND: 2, SPARE: 1}) as cluster:
        yield cluster


def command(cluster: RayCluster, name: str, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "megatron_mmrl.cli", "launch", "ray", "--address", cluster.address]
    shape = ["--config", str(CONFIG), "--nodes", "2", "--cpus-per-rank", "2", f"run.output_dir=runs/{name}"]
    return [*start, *shape, *SMALL, *TWO_RANKS, *arguments]


@contextmanager
def launched(
    cluster: RayCluster, work_dir: Path, name: str, arguments: Sequence[str]
) -> Iterator[subprocess.Popen[str]]:
    """The small run; afterwards nothing of it may be left on any node."""
    process = subprocess.Popen(
        command(cluster, name, *arguments),
        cwd=work_dir,
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not processes_in(work_dir), 15)


def refused(cluster: RayCluster, work_dir: Path, *arguments: str, **variables: str) -> str:
    """The last line of a command that ends before it starts anything."""
    done = subprocess.run(
        command(cluster, "refused", *arguments),
        cwd=work_dir,
        env=cluster.environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert not (work_dir / "runs" / "refused").exists()
    return done.stderr.strip().splitlines()[-1]


def steps_done(work_dir: Path, name: str) -> int:
    metrics = work_dir / "runs" / name / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else -1


def reward_workers() -> int:
    """How many workers the servers on spare CPUs have for the ranks now."""
    servers = [p for p in psutil.process_iter() if "megatron_mmrl.rewards.remote_server" in _words(p)]
    return sum(len(server.children()) for server in servers)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.timeout(900)
def test_a_run_gives_the_numbers_of_one_host(cluster: RayCluster, work_dir: Path, two_rank_run: Run) -> None:
    with launched(cluster, work_dir, "ray", ["--reward-cpus", "1"]) as process:
        wait_until(lambda: reward_workers() == 1 or process.poll() is not None, 200)
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    run = Run(path=work_dir / "runs" / "ray", output=output)
    assert untimed(run.rows) == untimed(two_rank_run.rows)
    assert run.completions(3) == two_rank_run.completions(3)  # scores among them
    assert "step 3/3" in output
    assert "Ray" not in errors
    logs = run.path / "logs" / "attempt_0"
    assert {"rank0.log", "rank1.log", "node0.log", "node1.log", f"server-{SPARE}.log"} <= {
        path.name for path in logs.iterdir()
    }
    assert "is lost" not in (logs / "rank0.log").read_text()


def test_who_may_not_join_is_told_why(cluster: RayCluster, work_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("ab" * 32)
    other = refused(cluster, work_dir, RAY_AUTH_TOKEN_PATH=str(tmp_path / "other"))
    assert other.startswith(f"error: the Ray cluster at {cluster.address} refuses our token; ")
    assert "asks for a token; set RAY_AUTH_MODE=token" in refused(cluster, work_dir, RAY_AUTH_MODE="disabled")
    assert "no Ray cluster answers at 127.0.0.20:9" in refused(cluster, work_dir, "--address", "127.0.0.20:9")


def test_a_cluster_that_lets_anyone_in_is_refused(work_dir: Path) -> None:
    with ray_cluster({}, with_token=False) as open_cluster:
        assert "asks for no token: whoever reaches it can run code" in refused(open_cluster, work_dir)
        told = refused(open_cluster, work_dir, "--allow-open-cluster")
        assert "2 nodes with 2 CPU free are needed, 0 found; the cluster has" in told


def test_too_little_room_is_said_with_what_there_is(cluster: RayCluster, work_dir: Path) -> None:
    told = refused(cluster, work_dir, "--cpus-per-rank", "64")
    assert "2 nodes with 64 CPU free are needed, 0 found" in told
    assert f"({FIRST}): 0 of 0 GPUs and 2 of 2 CPUs free" in told


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_lost_node_and_a_request_to_stop_change_nothing(
    cluster: RayCluster, work_dir: Path, two_rank_run: Run
) -> None:
    path = work_dir / "runs" / "broken"
    with launched(cluster, work_dir, "broken", ["run.save_every=1", "--max-restarts", "1"]) as process:
        wait_until(lambda: (path / "checkpoints" / "step_1").exists() or process.poll() is not None, 400)
        cluster.kill(SECOND)
        cluster.start(LATE, 2)  # takes the place of the lost one
        wait_until(lambda: (path / "logs/attempt_1/rank0.log").exists() or process.poll() is not None, 200)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 85, errors
    assert f"({SECOND}), was lost: " in errors
    with launched(cluster, work_dir, "broken", ["run.save_every=1", "run.resume=auto"]) as process:
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    run = Run(path=path, output=output)
    assert re.search(r"continuing after step [12] of 3", output)  # whether a step was done before it listened
    assert untimed(run.rows) == untimed(two_rank_run.rows)
    assert {f"attempt_{number}" for number in range(3)} == {path.name for path in (path / "logs").iterdir()}
