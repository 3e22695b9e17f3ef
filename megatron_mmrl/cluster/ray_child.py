"""What runs inside Ray's actors: one process, started, watched and signalled from afar. No ray here."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mmrl.cluster.stop import requests_held
from megatron_mmrl.cluster.tied import tied

_READ_BYTES = 1 << 16
_TAIL_BYTES = 4096
# What Ray sets for its own workers; among it, of a cluster with tokens, the token.
_RAYS_PREFIX = "RAY_"
_RAYS_NAMES = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What has become of the process since the last report."""

    output: bytes  # of its standard output
    code: int | None  # None: it runs; negative: the signal that ended it
    last_error: str  # the last line on its standard error, once it has ended


class Child:
    """One process, which dies with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._output = bytearray()
        self._forgotten = 0  # bytes of output that were reported and dropped
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._started = threading.Event()
        self._problem: OSError | None = None  # why it did not start
        self._errors = Path()

    def free_port(self, address: str) -> int:
        """A TCP port of this node that is free, and stays so for who listens with SO_REUSEADDR, as torch's store does.

        It is held by a socket that is bound and does not listen: no other program, and no outgoing connection, gets it.
        """
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind((address, 0))
        return int(self._held.getsockname()[1])

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], directory: str, errors: Path) -> None:
        """Run Python with ``arguments``.

        Args:
            arguments: of the interpreter that runs this.
            environment: added to what this process has, but for Ray's own.
            directory: where.
            errors: its standard error is appended to this file.

        Raises:
            OSError: the directory, or the file's, is not there or not writable on this node.
        """
        thread = threading.Thread(
            target=self._run, args=(arguments, environment, directory, errors), name="child", daemon=True
        )
        thread.start()  # lives as long as the process, which dies with the thread that started it
        self._started.wait()
        if self._problem is not None:
            raise self._problem

    def poll(self, seen: int) -> Report:
        """What was printed after its first ``seen`` bytes, and how it ended."""
        ended = self._done.is_set()  # before the output is looked at: nothing comes after
        with self._lock:
            del self._output[: seen - self._forgotten]
            self._forgotten = seen
            output = bytes(self._output)
        if not ended or self._process is None:
            return Report(output=output, code=None, last_error="")
        return Report(output=output, code=self._process.returncode, last_error=_last_line(self._errors))

    def signal(self, number: int) -> None:
        """Send a signal to the process if it runs."""
        if self._process is not None and not self._done.is_set():
            self._process.send_signal(number)

    def _run(self, arguments: Sequence[str], environment: Mapping[str, str], directory: str, errors: Path) -> None:
        try:
            self._process = _popen(arguments, environment, directory, errors)
            self._errors = errors
        except OSError as problem:
            self._problem = problem
            return
        finally:
            self._started.set()
        assert self._process.stdout is not None
        while data := os.read(self._process.stdout.fileno(), _READ_BYTES):
            with self._lock:
                self._output += data
        self._process.wait()
        self._done.set()


def _popen(
    arguments: Sequence[str], environment: Mapping[str, str], directory: str, errors: Path
) -> subprocess.Popen[bytes]:
    errors.parent.mkdir(parents=True, exist_ok=True)
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_RAYS_PREFIX) and name not in _RAYS_NAMES
    }
    with errors.open("ab") as file, requests_held():  # a request that comes early waits until it is listened for
        return subprocess.Popen(
            tied(os.getpid(), arguments),
            cwd=directory,
            env=inherited | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
        )


def _last_line(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
