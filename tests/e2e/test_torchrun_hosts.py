"""Runs over several hosts under torchrun: the numbers of one host, and one end for all."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.dist.launch import free_port
from tests.e2e import hosts
from tests.e2e.run import CONFIG, SMALL, TWO_RANKS, Run, environment, train, untimed

TWO_BY_TWO = ("parallel.pipeline_model_parallel_size=2", "run.num_steps=2")  # tensor 2 within a host, pipeline across
THREE_RANKS = (
    *TWO_RANKS,
    "parallel.data_parallel_size=3",
    "rollout.num_engines=3",
    "rollout.prompts_per_step=9",
    "supervised.batch_sequences=36",
    "run.num_steps=2",
)
pytestmark = pytest.mark.timeout(900)  # whole runs, one after the other
needs_hosts = pytest.mark.skipif(bool(hosts.why_not()), reason=f"no hosts: {hosts.why_not()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The launchers of one run, one to a host."""

    path: Path  # output directory
    launchers: list[subprocess.Popen[str]]

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert all(launcher.poll() is None for launcher in self.launchers), self.finish(kill=True)
            assert time.monotonic() < deadline, self.finish(kill=True)
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        metrics = self.path / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > step)

    def finish(self, *, kill: bool = False) -> list[tuple[int, str]]:
        """Exit code and all output of each launcher, after its end."""
        if kill:
            self.end()
        ended = [launcher.communicate(timeout=400) for launcher in self.launchers]
        return [(launcher.returncode, "".join(texts)) for launcher, texts in zip(self.launchers, ended, strict=True)]

    def end(self) -> None:
        """Nothing of it is left."""
        for launcher in self.launchers:
            if launcher.poll() is None:
                for process in psutil.Process(launcher.pid).children(recursive=True):
                    process.kill()
                launcher.kill()


def plain_torchrun(node: int, num_nodes: int, ranks: int, master: str, port: int) -> list[str]:
    """As a user without our launchers starts it."""
    place = (f"--nnodes={num_nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks}")
    meeting = (f"--master-addr={master}", f"--master-port={port}")
    return [sys.executable, "-m", "torch.distributed.run", *place, *meeting, "-m", "megatron_mmrl.train"]


def our_launcher(node: int, num_nodes: int, ranks: int, master: str, port: int) -> list[str]:
    place = ("--nodes", str(num_nodes), "--node", str(node), "--gpus-per-node", str(ranks), "--master-addr", master)
    return [sys.executable, "-m", "megatron_mmrl.cli", "launch", "torchrun", *place, f"cluster.master_port={port}"]


def arguments(name: str, overrides: Sequence[str]) -> list[str]:
    return ["--config", str(CONFIG), f"run.output_dir=runs/{name}", *SMALL, *overrides]


@contextmanager
def running(
    work_dir: Path,
    name: str,
    overrides: Sequence[str],
    machines: Sequence[hosts.Host],
    *,
    command: Callable[..., list[str]] = our_launcher,
    ranks: int = 1,
    only_on_last: Sequence[str] = (),
) -> Iterator[Nodes]:
    """The small run on ``machines``, with ``ranks`` on each; the last one has more overrides than the others."""
    port = free_port()
    words = [
        [*command(node, len(machines), ranks, machines[0].address, port), *arguments(name, overrides)]
        for node in range(len(machines))
    ]
    env = environment()
    words[-1] += only_on_last
    launchers = [machine.start(line, work_dir, env) for machine, line in zip(machines, words, strict=True)]
    nodes = Nodes(path=work_dir / "runs" / name, launchers=launchers)
    try:
        yield nodes
    finally:
        nodes.end()


def assert_same_steps(ours: Run, theirs: Run, steps: int) -> None:
    """Rows up to ``steps`` agree but for the evaluation that a shorter run ends with."""
    for mine, other in zip(untimed(ours.rows)[: steps + 1], untimed(theirs.rows), strict=False):
        common = mine.keys() & other.keys()
        assert "loss" in common or mine["step"] == 0
        assert {key: mine[key] for key in common} == {key: other[key] for key in common}
    for step in range(1, steps + 1):
        assert ours.completions(step) == theirs.completions(step)


def without_traffic(run: Run) -> list[dict[str, float]]:
    """Rows without how weights reach the engines, which depends on who shares a host."""
    return [{key: row[key] for key in row if not key.startswith("reshard/")} for row in untimed(run.rows)]


class Loopback:
    """This machine as one more host, for agents side by side."""

    address = "127.0.0.1"

    def start(self, command: Sequence[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def test_two_agents_on_loopback_do_what_one_does(work_dir: Path, two_rank_run: Run) -> None:
    overrides = (*TWO_RANKS, "run.num_steps=2", "run.export_hf=false")
    with running(work_dir, "agents", overrides, [Loopback(), Loopback()], command=plain_torchrun) as nodes:
        ends = nodes.finish()
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_steps(Run(path=nodes.path, output=""), two_rank_run, 2)


def test_agents_with_other_parallel_sizes_end_and_say_so(work_dir: Path) -> None:
    stages = ("parallel.pipeline_model_parallel_size=2", "parallel.data_parallel_size=1")
    pair = [Loopback(), Loopback()]
    with running(work_dir, "disagree", TWO_RANKS, pair, command=plain_torchrun, only_on_last=stages) as nodes:
        ends = nodes.finish()
    assert [code for code, _ in ends] == [1, 1]
    said = [line for _, text in ends for line in text.splitlines() if line.startswith("error: ")]
    assert said
    for line in said:
        assert "error: the parallel sizes are tensor 1 x pipeline 1 x context 1 x data 2 on rank 0 (" in line
        assert "but tensor 1 x pipeline 2 x context 1 x data 1 on rank 1 (" in line


@needs_hosts
def test_a_stop_on_one_host_stops_all_and_the_run_goes_on_to_the_same_end(work_dir: Path, two_rank_run: Run) -> None:
    with hosts.hosts(2) as machines:
        with running(work_dir, "hosts", TWO_RANKS, machines) as nodes:
            nodes.wait_for_step(1)
            nodes.launchers[1].send_signal(signal.SIGUSR1)
            ends = nodes.finish()
        run = Run(path=nodes.path, output="")
        done = len(run.rows) - 1
        assert [code for code, _ in ends] == [85, 85], ends
        assert 1 <= done < 3
        assert (run.path / "checkpoints" / f"step_{done}").is_dir()
        again = (*TWO_RANKS, "run.resume=auto")
        with running(work_dir, "hosts", again, machines, command=plain_torchrun) as nodes:
            ends = nodes.finish()
    assert [code for code, _ in ends] == [0, 0], ends
    assert untimed(run.rows) == untimed(two_rank_run.rows)
    assert_same_steps(run, two_rank_run, 3)


@needs_hosts
def test_a_killed_rank_ends_all_hosts_and_is_named(work_dir: Path) -> None:
    with hosts.hosts(2) as machines, running(work_dir, "killed", TWO_RANKS, machines) as nodes:
        logs = nodes.path / "logs" / "attempt_0"
        nodes.wait_until(lambda: (logs / "engine0.log").exists() and (logs / "engine1.log").exists())  # they have met
        family = psutil.Process(nodes.launchers[1].pid).children(recursive=True)
        rank = next(process for process in family if process.environ().get("RANK") == "1")
        rank.kill()
        ends = nodes.finish()
    for code, output in ends:
        assert code == 1, output
        assert output.rstrip().splitlines()[-1] == "error: rank 1: killed by SIGKILL", output


@needs_hosts
@pytest.mark.full
@pytest.mark.parametrize(
    ("overrides", "num_hosts", "ranks", "receives"),
    [
        pytest.param(THREE_RANKS, 3, 1, False, id="DP3"),  # a whole model and an engine on every host
        pytest.param(TWO_BY_TWO, 2, 2, True, id="TP2xPP2"),  # the engine's host has half of the layers
    ],
)
def test_hosts_do_what_one_does(
    work_dir: Path,
    overrides: tuple[str, ...],
    num_hosts: int,
    ranks: int,
    receives: bool,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    overrides = (*overrides, "run.export_hf=false")
    one = train(work_dir, f"{name}-one", overrides)
    with (
        hosts.hosts(num_hosts) as machines,
        running(work_dir, f"{name}-hosts", overrides, machines, ranks=ranks) as nodes,
    ):
        ends = nodes.finish()
    assert [code for code, _ in ends] == [0] * num_hosts, ends
    run = Run(path=nodes.path, output="")
    assert without_traffic(run) == without_traffic(one)
    assert (run.rows[1]["reshard/receive_bytes"] > 0) is receives
    assert one.rows[1]["reshard/receive_bytes"] == 0
