"""Which nodes of a Ray cluster are chosen, what a dry run says, a process held from afar, and the verdict."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from megatron_mmrl.cluster.failure import record_death
from megatron_mmrl.cluster.ray_child import Child, Report
from megatron_mmrl.cluster.ray_plan import (
    ClusterNode,
    Demand,
    ShortageError,
    choose_nodes,
    choose_spare_cpus,
    demand_of,
    passed_on,
)
from megatron_mmrl.cluster.ray_watch import End, LostNodeError, Watch
from megatron_mmrl.cluster.stop import REQUEST
from megatron_mmrl.cluster.torchrun import Requests
from tests.e2e.run import REPOSITORY

PRESET = str(REPOSITORY / "configs" / "presets" / "mm_eureka_32b.yaml")
RUNNING = Report(output=b"", code=None, last_error="")


def node(number: int, *, gpus: int = 8, cpus: int = 64, used_gpus: int = 0, used_cpus: int = 0) -> ClusterNode:
    return ClusterNode(
        id=f"id{number}",
        address=f"10.0.0.{number}",
        name=f"host{number}",
        gpus=gpus,
        cpus=cpus,
        free_gpus=gpus - used_gpus,
        free_cpus=cpus - used_cpus,
    )


def ended(code: int, last_error: str = "") -> Report:
    return Report(output=b"", code=code, last_error=last_error)


def test_ranks_take_a_gpu_and_a_cpu_each_or_cpus_alone() -> None:
    assert demand_of(8, None).bundle == {"GPU": 8.0, "CPU": 8.0}
    assert demand_of(2, 4).bundle == {"CPU": 8.0}


def test_nodes_are_numbered_by_address_and_the_tightest_are_taken() -> None:
    cluster = [node(12), node(9), node(1, gpus=0), node(3, used_gpus=1), node(10), node(2, gpus=16)]
    chosen = choose_nodes(cluster, Demand(gpus=8, cpus=8), 3)
    assert [at.address for at in chosen] == ["10.0.0.9", "10.0.0.10", "10.0.0.12"]  # not the one with 16 GPUs
    assert choose_nodes(list(reversed(cluster)), Demand(gpus=8, cpus=8), 3) == chosen


def test_a_shortage_lists_what_there_is() -> None:
    with pytest.raises(ShortageError) as told:
        choose_nodes([node(2, used_gpus=3), node(1, gpus=0)], Demand(gpus=8, cpus=8), 1)
    assert str(told.value) == (
        "1 nodes with 8 GPU and 8 CPU free are needed, 0 found; the cluster has host1 (10.0.0.1): 0 of 0 GPUs and 64 "
        "of 64 CPUs free; host2 (10.0.0.2): 5 of 8 GPUs and 64 of 64 CPUs free"
    )


def test_spare_cpus_come_from_nodes_without_ranks_first() -> None:
    cluster = [node(1), node(2), node(3, gpus=0, cpus=16), node(4, gpus=0, cpus=32)]
    spare = choose_spare_cpus(cluster, {"id1", "id2"}, Demand(gpus=8, cpus=60), 54)
    assert [(at.address, cpus) for at, cpus in spare] == [
        ("10.0.0.4", 32),
        ("10.0.0.3", 16),
        ("10.0.0.1", 4),
        ("10.0.0.2", 2),
    ]
    assert choose_spare_cpus(cluster[:1], {"id1"}, Demand(gpus=8, cpus=64), 5) == []


def test_secrets_stay_where_they_are() -> None:
    here = {"HF_TOKEN": "s", "NCCL_DEBUG": "INFO", "PATH": "/bin", "WANDB_API_KEY": "s", "PYTHONPATH": "x", "MINE": "1"}
    assert passed_on(here) == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "x"}
    assert passed_on(here, ["MINE"]) == {"MINE": "1", "NCCL_DEBUG": "INFO", "PYTHONPATH": "x"}


def dry_run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mmrl.cli", "launch", "ray", "--config", PRESET, "--dry-run", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "NCCL_DEBUG": "a b", "HF_TOKEN": "a secret"},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_a_dry_run_needs_no_cluster_and_repeats_itself() -> None:
    shape = ("--nodes", "2", "--cpus-per-rank", "3", "--reward-cpus", "5", "run.output_dir=with space")
    said = dry_run(*shape)
    assert said == dry_run(*shape)
    assert said.startswith("0\n")
    assert said.count("placement group STRICT_PACK [{CPU: 24}]") == 2
    assert "'run.output_dir=with space' cluster.master_port=PORT --nodes 2 --gpus-per-node 8 --node 1" in said
    assert "python -m megatron_mmrl.rewards.remote_server --address NODE" in said
    assert "'NCCL_DEBUG=a b'" in said
    assert "secret" not in said
    assert "placement group STRICT_PACK [{GPU: 8, CPU: 8}]" in dry_run("--nodes", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpus-per-rank", "0"], "--cpus-per-rank 0: use 1 or more, or leave it out to run on GPUs"),
        (["--reward-cpus", "-1"], "--reward-cpus -1: use 0 or more"),
        (["--pass-env", "NOT_THERE"], "--pass-env NOT_THERE: there is no such variable here"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    assert dry_run("--nodes", "2", *arguments) == f"2\nerror: {message}\n"


def report_of(child: Child, seen: int = 0) -> Report:
    deadline = time.monotonic() + 30
    while (report := child.poll(seen)).code is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return report


def test_a_child_is_started_watched_and_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a secret")
    code = (
        "import os, signal, sys; print(os.getcwd(), os.environ['MINE'], 'RAY_AUTH_TOKEN' in os.environ, flush=True);"
        "print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), flush=True);"
        "signal.sigwait([signal.SIGUSR1]); sys.exit('the last\\nerror: line')"
    )
    child = Child()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in Ray's workers
    try:
        child.start(["-c", code], {"MINE": "1"}, str(tmp_path), tmp_path / "logs" / "node0.log")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    child.signal(REQUEST)  # early: it is not yet listening
    report = report_of(child)
    assert report == Report(output=f"{tmp_path} 1 False\n{REQUEST:d}\n".encode(), code=1, last_error="error: line")
    assert child.poll(len(report.output) - 3).output == b"10\n"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Child().start(["-c", ""], {}, str(tmp_path / "nowhere"), tmp_path / "e")


def test_a_port_is_kept_for_the_store() -> None:
    child = Child()
    port = child.free_port("127.0.0.1")
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)):  # reuses addresses, as torch's store does
        pass


def test_a_child_dies_with_its_holder(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from megatron_mmrl.cluster.ray_child import Child; c = Child();"
        "c.start(['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], {}, '.', Path('e'))\n"
        "while not (out := c.poll(0).output): time.sleep(0.02)\n"
        "print(out.decode(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holder], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not [left for left in alive if left.status() != psutil.STATUS_ZOMBIE]


class Nodes:
    """What nodes answer, one list after the other; the last for ever."""

    def __init__(self, *answers: Sequence[Report | LostNodeError | None]) -> None:
        self.answers = list(answers)
        self.signals: list[int] = []

    def poll(self) -> Sequence[Report | LostNodeError | None]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
    return Requests(once=True)


def end_of(nodes: Nodes, requests: Requests, log_dir: Path) -> End:
    return Watch([nodes, nodes], nodes.poll, requests, log_dir).until_end()


def test_good_ends(requests: Requests, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    shown = Report(output=b"step 1\n", code=None, last_error="")
    assert end_of(Nodes([shown, RUNNING], [ended(0), ended(0)]), requests, tmp_path) == End(code=0)
    assert capfdbinary.readouterr().out == b"step 1\n"
    requests.to_stop = True
    nodes = Nodes([RUNNING, RUNNING], [None, ended(85)], [ended(85), ended(85)])
    assert end_of(nodes, requests, tmp_path) == End(code=85)
    assert nodes.signals == [REQUEST, REQUEST]  # once to each


def test_the_cause_is_the_rank_that_failed_first(requests: Requests, tmp_path: Path) -> None:
    record_death(tmp_path, 1, -9)
    end = end_of(Nodes([RUNNING, ended(1)], [ended(1), ended(1)]), requests, tmp_path)
    assert end == End(code=1, message="error: rank 1: killed by SIGKILL")
    assert end.may_start_again


def test_a_lost_node_is_the_cause_whatever_its_peers_say(requests: Requests, tmp_path: Path) -> None:
    record_death(tmp_path, 0, 1)
    lost = LostNodeError("node 1, host (10.0.0.2), was lost: gone")
    end = end_of(Nodes([ended(1), None], [ended(1), None], [ended(1), lost]), requests, tmp_path)
    assert end == End(code=1, message="error: node 1, host (10.0.0.2), was lost: gone")


def test_a_node_that_refuses_the_configuration_is_quoted(requests: Requests, tmp_path: Path) -> None:
    said = ended(2, "error: data.train_files: a.parquet does not exist")
    end = end_of(Nodes([ended(0), said]), requests, tmp_path)
    assert end == End(code=2, message="error: node 1: data.train_files: a.parquet does not exist")
    assert not end.may_start_again


def test_an_interrupt_ends_all(requests: Requests, tmp_path: Path) -> None:
    requests.to_end = signal.SIGINT
    nodes = Nodes([RUNNING, RUNNING], [ended(130), ended(130)])
    assert end_of(nodes, requests, tmp_path) == End(code=130, message="interrupted (SIGINT)")
    assert nodes.signals == [signal.SIGINT, signal.SIGINT]
