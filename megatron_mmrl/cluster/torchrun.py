"""One node's share of a run under torchrun: start its agent, pass requests to stop on to the ranks, keep their verdict.

torchrun turns every end but a good one into exit code 1 and answers SIGUSR1 by dying. Here the ranks get the request
themselves, and the node's exit code is what they meant, as with ``cluster/local.py``.

Schedulers signal in their own way. Slurm sends what it was asked to send to every process of the task, perhaps more
than once, and ends all nodes when the first leaves with another code than 0.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_mmrl.cluster.failure import (
    FAILURE_DIR,
    OUTPUT_TO_FILES,
    all_stopped,
    first_cause,
    forget_ends,
    read_failures,
)
from megatron_mmrl.cluster.local import default_environment
from megatron_mmrl.cluster.plan import Topology
from megatron_mmrl.cluster.stop import ASKING, EXIT_REQUEUE, ask, requests_held
from megatron_mmrl.lifetime import adopt_orphans, die_with_parent, kill_descendants

_LOOK_EVERY_S = 0.2
_SETTLE_S = 5.0  # after a bad end: time for other nodes to write down why, when these ranks only lost a peer


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShare:
    """Which part of a run one node does, and where all nodes meet."""

    topology: Topology
    node: int
    master_addr: str
    master_port: int

    @property
    def ranks(self) -> range:
        """This node's ranks."""
        return self.topology.ranks_of(self.node)


def torchrun_command(share: NodeShare, module: str, arguments: Sequence[str]) -> list[str]:
    """What starts the ranks of one node: torchrun's agent, by way of this Python."""
    return [
        sys.executable,
        "-m",
        "megatron_mmrl.cluster.agent",
        f"--nnodes={share.topology.num_nodes}",
        f"--nproc-per-node={share.topology.ranks_per_node}",
        f"--node-rank={share.node}",
        f"--master-addr={share.master_addr}",
        f"--master-port={share.master_port}",
        "-m",
        module,
        *arguments,
    ]


def run_node(share: NodeShare, module: str, arguments: Sequence[str], log_dir: Path, *, stop_once: bool = True) -> int:
    """Run one node's ranks to their end; on return no descendant of this process is left.

    To be called from the main thread of a process that has nothing else to do. SIGTERM or SIGUSR1 asks the ranks to
    save and leave; a second one, or SIGINT, ends them at once.

    Args:
        share: which ranks.
        module: what each rank runs; its ``__main__`` calls ``run_rank``.
        arguments: its command line.
        log_dir: for the ranks' output and the records of their ends, on a path that all nodes share.
        stop_once: a second request to stop ends the ranks; else it changes nothing.

    Returns:
        0 when all ranks returned 0; EXIT_REQUEUE when they saved because they were asked to stop; 128 + signal number
        when interrupted; else the exit code of the failure that came first, which is the last line on standard error.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    forget_ends(log_dir, share.ranks)
    adopt_orphans()
    requests = Requests(once=stop_once)
    parent = os.getpid()
    with requests_held():
        process = subprocess.Popen(
            torchrun_command(share, module, arguments),
            env=dict(os.environ) | environment(share, log_dir),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # signals to this process's group are this process's to pass on
            preexec_fn=lambda: die_with_parent(parent),
        )
    try:
        code = _watch(process, requests)
    finally:
        kill_descendants()
    return _verdict(code, share, log_dir)


class Requests:
    """What signals have asked for since this was made."""

    def __init__(self, *, once: bool) -> None:
        """``once``: a second request to stop asks for the end."""
        self._once = once
        self.to_stop = False
        self.to_end: int | None = None  # the signal
        for number in ASKING:
            signal.signal(number, self._note_stop)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_end)

    def _note_stop(self, number: int, *_: object) -> None:
        if self.to_stop and self._once:
            self.to_end = number
        self.to_stop = True

    def _note_end(self, number: int, *_: object) -> None:
        self.to_end = number


def environment(share: NodeShare, log_dir: Path) -> dict[str, str]:
    """What the agent and its ranks find in their environment besides what torchrun sets; the user's values stay."""
    defaults = default_environment(share.topology.ranks_per_node)
    users = {name: os.environ[name] for name in defaults if name in os.environ}
    return defaults | users | {FAILURE_DIR: str(log_dir.resolve()), OUTPUT_TO_FILES: "1"}


def _watch(process: subprocess.Popen[bytes], requests: Requests) -> int:
    """Wait for torchrun's end; its exit code, or 128 + signal number when it was cut short."""
    asked: set[int] = set()
    while (code := process.poll()) is None:
        if requests.to_end is not None:
            print(f"interrupted ({signal.Signals(requests.to_end).name})", file=sys.stderr)
            return 128 + requests.to_end
        if requests.to_stop:  # again and again: torchrun may still be starting its ranks
            for pid in _ranks(process.pid) - asked:
                ask(pid)
                asked.add(pid)
        time.sleep(_LOOK_EVERY_S)
    return code


def _ranks(agent: int) -> set[int]:
    """Process ids of the ranks that torchrun's agent has started."""
    found = set()
    for child in psutil.Process(agent).children():
        try:
            if "RANK" in child.environ():
                found.add(child.pid)
        except psutil.Error:  # it has just ended, or has not yet become what it will be
            continue
    return found


def _verdict(code: int, share: NodeShare, log_dir: Path) -> int:
    if all_stopped(log_dir, share.ranks):
        return EXIT_REQUEUE
    if code in (0, 128 + signal.SIGINT, 128 + signal.SIGHUP, *(128 + number for number in ASKING)):
        return code
    _wait_for_a_cause(log_dir)
    print(f"logs of the ranks: {shlex.quote(str(log_dir))}/rank*.log", file=sys.stderr)
    failures = read_failures(log_dir)
    if not failures:
        print(f"error: torchrun ended with exit code {code} on node {share.node}", file=sys.stderr)
        return 1
    cause = first_cause(failures)
    print(cause.report, file=sys.stderr)
    return cause.exit_code


def _wait_for_a_cause(log_dir: Path) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while all(failure.lost_peer for failure in read_failures(log_dir)) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
