"""A real Slurm of this machine: its own munged, slurmctld and one slurmd per node, all in one directory.

Nodes are called 127.0.0.1, 127.0.0.2, ...: names that need no name service, all of them this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_mmrl.lifetime import die_with_parent
from tests.dist.launch import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# cred_expire is also how long a requeued job waits: 120 s by default, at least 5 s. Starting it sooner by hand fails
# now and then: a node refuses what it was told to end in the same second.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
KillWait=5
ReturnToService=2
PlugStackConfig=/dev/null
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """A running cluster."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its commands, and jobs that use them, need."""
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return plain | {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str) -> str:
        """Run one of its commands; what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """``scontrol show job``, as far as its values have no spaces."""
        words = self.run("scontrol", "show", "job", "--oneliner", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The ends of its daemons' logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.root.glob("*.log")))


@contextmanager
def running_slurm(root: Path, *, nodes: int) -> Iterator[Slurm]:
    """Start a cluster; on leaving the block, end it and every process of its jobs."""
    slurm = Slurm(root=root)
    _write_config(root, nodes)
    with ExitStack() as daemons:
        munge = root / "munge"
        daemons.enter_context(
            _daemon(
                ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}", f"--key-file={munge / 'key'}",
                 f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"],
                slurm,
            )
        )  # fmt: skip
        _wait_for(lambda: (munge / "socket").exists(), "munged's socket", slurm)
        daemons.enter_context(_daemon(["slurmctld", "-D", "-c"], slurm))
        for node in _names(nodes):
            daemons.enter_context(_daemon(["slurmd", "-D", "-c", "-N", node], slurm))
        _wait_for(lambda: _idle_nodes(slurm) == nodes, "idle nodes", slurm)
        yield slurm


def _write_config(root: Path, nodes: int) -> None:
    for name in ("munge", "state"):
        (root / name).mkdir(mode=0o755)
    key = root / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    host = os.uname().nodename.split(".")[0]
    rows = [
        f"NodeName={name} NodeAddr={name} NodeHostname={host} Port={free_port()} CPUs=1 RealMemory=100 State=UNKNOWN"
        for name in _names(nodes)
    ]
    text = CONFIG.format(host=host, port=free_port(), root=root, nodes="\n".join(rows))
    (root / "slurm.conf").write_text(text)


def _names(nodes: int) -> list[str]:
    return [f"127.0.0.{number + 1}" for number in range(nodes)]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _idle_nodes(slurm: Slurm) -> int:
    command = ["sinfo", "-h", "-N", "-o", "%T"]
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split().count("idle")


@contextmanager
def _daemon(command: Sequence[str], slurm: Slurm) -> Iterator[None]:
    parent = os.getpid()
    with (slurm.root / f"{command[0]}.out.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=slurm.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),  # also when the tests are killed
        )
    try:
        yield
    finally:
        _end(process)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    for process in family:
        if process.is_running():
            process.kill()


def _wait_for(condition: Callable[[], bool], what: str, slurm: Slurm, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {timeout_s} s\n{slurm.logs()}"
        time.sleep(0.1)
