"""Two nodes' shares under torchrun, side by side on this machine: one end for both, and its cause in the last line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_mmrl.cluster.stop import EXIT_REQUEUE
from tests.dist.launch import free_port, run_ranks

HERE = Path(__file__).parent
DRIVER = """
import sys
from pathlib import Path
from megatron_mmrl.cluster.plan import Topology
from megatron_mmrl.cluster.torchrun import NodeShare, run_node
directory, action, actor, node, ranks, port, stop_once = sys.argv[1:]
share = NodeShare(
    topology=Topology(num_nodes=2, ranks_per_node=int(ranks)),
    node=int(node), master_addr="127.0.0.1", master_port=int(port),
)
logs = Path(directory) / "logs"
sys.exit(run_node(share, "launcher_dummy", [directory, action, actor], logs, stop_once=stop_once == "True"))
"""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The launchers of two nodes."""

    launchers: list[subprocess.Popen[str]]
    directory: Path
    world_size: int

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 100
        while len(list(self.directory.glob("ready-*"))) < self.world_size:
            assert all(launcher.poll() is None for launcher in self.launchers)
            assert time.monotonic() < deadline, "the ranks did not come up"
            time.sleep(0.02)

    def pid(self, name: str) -> int:
        return int((self.directory / f"pid-{name}").read_text())

    def finish(self) -> list[tuple[int, str]]:
        """Each launcher's exit code and last line of standard error."""
        ended = [(launcher, launcher.communicate(timeout=100)[1]) for launcher in self.launchers]
        return [(launcher.returncode, errors.rstrip().rpartition("\n")[2]) for launcher, errors in ended]

    def exit_codes(self) -> list[int]:
        """Of both, after a good end; torchrun's agents may complain that the other was faster."""
        return [code for code, _ in self.finish()]

    def survivors(self) -> list[str]:
        """Ranks and engines that are still there."""
        names = [path.name.removeprefix("pid-") for path in self.directory.glob("pid-*")]
        return [name for name in names if psutil.pid_exists(self.pid(name))]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Nodes]]:
    launchers: list[subprocess.Popen[str]] = []

    def start(action: str, actor: int = 1, *, ranks: int = 1, stop_once: bool = True) -> Nodes:
        port = free_port()
        for node in range(2):
            words = [str(tmp_path), action, str(actor), str(node), str(ranks), str(port), str(stop_once)]
            launchers.append(
                subprocess.Popen([sys.executable, "-c", DRIVER, *words], cwd=HERE, text=True, stderr=subprocess.PIPE)
            )
        return Nodes(launchers, tmp_path, 2 * ranks)

    yield start
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.kill()
            launcher.communicate()


def test_ranks_have_the_places_that_were_planned(start: Callable[..., Nodes]) -> None:
    nodes = start("finish", ranks=2)
    assert nodes.exit_codes() == [0, 0]
    assert nodes.survivors() == []
    logs = nodes.directory / "logs"
    assert [(logs / f"rank{rank}.log").read_text() for rank in (1, 2, 3)] == [
        f"rank {rank} is up\n" for rank in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("action", "last_line"),
    [("raise", "error: rank 1: ValueError: reward/mean is nan"), ("lost_peer", "error: rank 1: killed by SIGKILL")],
)
def test_every_node_names_the_first_failure(start: Callable[..., Nodes], action: str, last_line: str) -> None:
    nodes = start(action)
    nodes.wait_until_up()
    if action == "raise":  # the ranks of a real run lose a peer then; these know of no peers
        nodes.launchers[1].wait(timeout=60)
        os.kill(nodes.pid("rank0"), signal.SIGTERM)
    assert nodes.finish() == [(1, last_line), (1, last_line)]
    assert nodes.survivors() == []


def test_a_request_to_every_process_reaches_the_ranks_and_ends_nothing_else(start: Callable[..., Nodes]) -> None:
    """Slurm signals all processes of a task, and the batch script repeats it."""
    nodes = start("save", ranks=2, stop_once=False)
    nodes.wait_until_up()
    for _ in range(2):
        for launcher in nodes.launchers:
            for process in (launcher, *psutil.Process(launcher.pid).children(recursive=True)):
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
    assert len(nodes.survivors()) == 8
    (nodes.directory / "listen").touch()
    (nodes.directory / "step-ends").touch()
    assert nodes.exit_codes() == [EXIT_REQUEUE, EXIT_REQUEUE]
    assert nodes.survivors() == []


def test_a_second_request_ends_a_node_at_once(start: Callable[..., Nodes]) -> None:
    nodes = start("save")
    nodes.wait_until_up()
    for launcher in nodes.launchers:
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        launcher.send_signal(signal.SIGTERM)
    assert nodes.finish() == [(128 + signal.SIGTERM, "interrupted (SIGTERM)")] * 2
    assert nodes.survivors() == []


def joined() -> tuple[str, str]:
    """What the network variables are once the ranks have met."""
    from megatron_mmrl.config.parallel import ParallelConfig
    from megatron_mmrl.parallel.state import initialize, shutdown

    initialize(ParallelConfig(data_parallel_size=2), 0)
    shutdown()
    return os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("lo", "=lo")),
        ({"NCCL_SOCKET_IFNAME": "ib"}, ("lo", "ib")),
        ({"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "localhost"}, ("lo", "=lo")),
    ],
)
def test_the_interface_that_leads_to_the_master_is_used_unless_another_is_named(
    given: dict[str, str], found: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert run_ranks(joined, 2, env=given) == [found, found]
