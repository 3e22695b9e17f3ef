"""Several hosts on one machine: network namespaces on a switch of their own, with no way out.

A host has its own address, loopback, host name (which nothing resolves) and /dev/shm; files are shared.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "fabric0"
# What a process does on entering a host: its name, its shared memory, then the command.
_ENTER = 'echo "$1" > /proc/sys/kernel/hostname && mount -t tmpfs -o size=2g shm /dev/shm && shift && exec "$@"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One of them."""

    namespace: str
    name: str
    address: str

    def start(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Run a command there; the process is the command's own."""
        entering = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", _ENTER, "enter", self.name]
        return subprocess.Popen(
            [*entering, *command],
            cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


def why_not() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        with hosts(1) as (host,):
            done = host.start(["true"], Path.cwd(), os.environ)
            return done.communicate(timeout=20)[1]
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr}"


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make them; on leaving the block, remove them."""
    made = [
        Host(namespace=f"mmrl-{os.getpid()}-{number}", name=f"host{number}", address=f"10.77.0.{number + 1}")
        for number in range(count)
    ]
    switch = f"mmrl-{os.getpid()}-switch"
    with ExitStack() as namespaces:
        namespaces.enter_context(_namespace(switch))
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for number, host in enumerate(made):
            namespaces.enter_context(_namespace(host.namespace))
            port = f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield made


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    _ip("netns", "add", name)
    try:
        yield
    finally:
        _ip("netns", "delete", name)  # with the interfaces in it


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)
