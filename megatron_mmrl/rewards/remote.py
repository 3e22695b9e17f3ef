"""Workers on other machines: an authenticated connection whose far end is a ``worker.py``'s standard input and output.

``remote_server.py`` starts one worker for each connection. When a worker is to end, its server has the last word: how
it ended and what processor time it had used. Where that word is missing, the machine is lost, no job is to blame, and
what was asked goes to another worker.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_mmrl.rewards.process import Ending, WorkerLostError

ENDPOINTS = "MMRL_REWARD_ENDPOINTS"  # of the ranks: "address:port:workers", with commas between
KEY = "MMRL_REWARD_KEY"  # of the ranks and the servers: random, known to one run
LAST_WORD = b"\x04"  # begins it; JSON holds no such byte
SHAKE_LIMIT_S = 10.0
_LAST_WORD_LIMIT_S = 3.0
_READ_BYTES = 1 << 16
_NONCE_BYTES = 32
_PROOF_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server of workers."""

    host: str
    port: int
    key: str = field(repr=False)

    def connect(self) -> Connection:
        """A new worker there.

        Raises:
            WorkerLostError: nobody answers.
            RuntimeError: the server has another key.
        """
        return Connection(self)


def endpoints_of(environment: Mapping[str, str], share: int, num_shares: int) -> list[Endpoint]:
    """One endpoint for each worker that share number ``share`` of ``num_shares`` may use; [] where there are none."""
    workers = []
    for entry in filter(None, environment.get(ENDPOINTS, "").split(",")):
        host, port, count = entry.rsplit(":", 2)
        workers += [Endpoint(host=host, port=int(port), key=environment[KEY])] * int(count)
    return workers[share::num_shares]


class Connection:
    """A worker on another machine (a ``Link`` of ``process.py``)."""

    pid = None

    def __init__(self, endpoint: Endpoint) -> None:
        self._where = f"{endpoint.host}:{endpoint.port}"
        self._last_word: bytearray | None = None
        with contextlib.ExitStack() as on_error:
            try:
                self._socket = socket.create_connection((endpoint.host, endpoint.port), timeout=SHAKE_LIMIT_S)
                on_error.callback(self._socket.close)
                prove_to_server(self._socket, endpoint.key)
            except OSError as error:
                raise WorkerLostError(f"{self._where}: {error}") from error
            on_error.pop_all()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self.output = self._socket.fileno()
        self.input = os.dup(self.output)  # one number for each direction, for who waits for both

    def read(self) -> bytes:
        try:
            data = self._socket.recv(_READ_BYTES)
        except ConnectionError:
            return b""
        if self._last_word is not None:
            self._last_word += data
            return b""
        answers, begun, word = data.partition(LAST_WORD)
        if begun:
            self._last_word = bytearray(word)
        return answers

    def is_running(self) -> bool:
        return True  # its end comes to light when it is read from

    def end(self, *, closed: bool) -> Ending:
        with self._socket:
            os.close(self.input)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)  # what the server waits for
            self._drain(time.monotonic() + _LAST_WORD_LIMIT_S)
        try:
            word = json.loads(self._last_word or b"")
        except ValueError as error:
            raise WorkerLostError(f"{self._where}: no word of how the worker ended") from error
        return Ending(code=word["code"], cpu_s=word["cpu_s"])

    def _drain(self, deadline: float) -> None:
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    return
                if self._last_word is None:
                    _, begun, data = data.partition(LAST_WORD)
                    self._last_word = bytearray() if begun else None
                if self._last_word is not None:
                    self._last_word += data
        except OSError:  # too late, or gone: then the last word is missing
            return


def prove_to_server(connection: socket.socket, key: str) -> None:
    """Show a server that we know the key, and have it show the same; the key itself does not travel.

    Raises:
        RuntimeError: one of the two does not know it.
        OSError: the connection broke, or the server did not answer in time.
    """
    challenge = _receive(connection, _NONCE_BYTES)
    own = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(own + _proof(key, b"client", challenge, own))
    try:
        proof = _receive(connection, _PROOF_BYTES)
    except ConnectionError as error:
        raise RuntimeError(f"the worker server refused the key in {KEY}; start both with the same") from error
    if not hmac.compare_digest(proof, _proof(key, b"server", own, challenge)):
        raise RuntimeError(f"what answers as worker server does not know the key in {KEY}")


def prove_to_client(connection: socket.socket, key: str) -> bool:
    """The server's part of ``prove_to_server``; whether the client knows the key. Raises OSError as there."""
    challenge = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(challenge)
    theirs = _receive(connection, _NONCE_BYTES)
    if not hmac.compare_digest(_receive(connection, _PROOF_BYTES), _proof(key, b"client", challenge, theirs)):
        return False
    connection.sendall(_proof(key, b"server", theirs, challenge))
    return True


def _proof(key: str, who: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(key.encode(), who + b"".join(nonces), "sha256")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("closed by the other end")
        data += part
    return data
