"""A real Ray cluster on this machine: a node is a raylet with a loopback address of its own; tokens are demanded."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.dist.launch import free_port
from tests.e2e.run import environment

HEAD = "127.0.0.10"


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A head without CPUs to offer, and the nodes that were started."""

    path: Path
    port: int
    token: Path | None  # None: anybody may join

    @property
    def address(self) -> str:
        return f"{HEAD}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)} if self.token else {}
        return {**environment(), **mode, "GLOO_SOCKET_IFNAME": "lo", "HOME": str(self.path)}

    def start(self, address: str, cpus: int) -> None:
        """Start a node."""
        role = (
            ("--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.path}")
            if address == HEAD
            else (f"--address={self.address}",)
        )
        room = (f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats")
        ports = ("--min-worker-port=0", "--max-worker-port=0")  # whatever is free: all nodes share this machine's
        ray = str(Path(sys.executable).with_name("ray"))
        done = subprocess.run(
            [ray, "start", *role, f"--node-ip-address={address}", *room, *ports],
            cwd=self.path,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=(self.path / "start.log").open("ab"),  # not a pipe: the node keeps it
            stderr=subprocess.STDOUT,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (self.path / "start.log").read_text()

    def kill(self, address: str) -> None:
        """End a node's raylet and Ray's processes below it, our actors among them, but not what those started."""
        (raylet,) = (p for p in self._processes() if _has(p, "raylet/raylet", f"--node_ip_address={address}"))
        for process in [raylet, *raylet.children()]:
            process.kill()

    def close(self) -> None:
        family = [child for process in self._processes() for child in process.children(recursive=True)]
        for process in {*family, *self._processes()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _has(process, str(self.path))]


@contextmanager
def ray_cluster(cpus: Mapping[str, int], *, with_token: bool = True) -> Iterator[RayCluster]:
    """A head and nodes with so many CPUs."""
    path = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # pytest's directories make names of sockets too long
    token = path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    cluster = RayCluster(path=path, port=free_port(), token=token if with_token else None)
    try:
        for address, number in {HEAD: 0, **cpus}.items():
            cluster.start(address, number)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(path)


def _has(process: psutil.Process, *words: str) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return all(word in line for word in words)


def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def processes_in(directory: Path) -> list[psutil.Process]:
    """Those that run there: ranks, engines, their workers and launchers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(directory):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
