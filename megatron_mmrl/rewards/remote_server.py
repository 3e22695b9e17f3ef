"""Serves worker processes to the ranks of one run, one for each connection, for as long as the connection is open.

  MMRL_REWARD_KEY=... python -m megatron_mmrl.rewards.remote_server --address A

prints its port, then serves until it is killed. It copies no data: a worker reads and writes the connection itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import socketserver
import sys
from collections.abc import Sequence

from megatron_mmrl.rewards.process import EXIT_LIMIT_S, end_worker, is_running, start_worker
from megatron_mmrl.rewards.remote import KEY, LAST_WORD, SHAKE_LIMIT_S, prove_to_client

_SILENT_S = 30  # after so long the kernel asks whether the other machine is still there


class WorkerServer(socketserver.ThreadingTCPServer):
    """Listens on ``address``; ``server_address[1]`` is the port. A worker dies with its connection's thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, key: str) -> None:
        self.key = key
        super().__init__((address, 0), _Handler)


class _Handler(socketserver.BaseRequestHandler):
    server: WorkerServer
    request: socket.socket

    def handle(self) -> None:
        connection = self.request
        connection.settimeout(SHAKE_LIMIT_S)
        try:
            if not prove_to_client(connection, self.server.key):
                print(f"refused {self.client_address[0]}: it does not know the key", file=sys.stderr)
                return
        except OSError:
            return  # it hung up, or said nothing in time
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENT_S)
        _serve_worker(connection)


def _serve_worker(connection: socket.socket) -> None:
    worker = start_worker(stdin=connection.fileno(), stdout=connection.fileno())
    process = os.pidfd_open(worker.pid)
    try:
        events = select.poll()
        events.register(connection, select.POLLRDHUP)  # errors and hang-ups are told in any case
        events.register(process, select.POLLIN)
        events.poll()
    finally:
        os.close(process)
        ended_itself = not is_running(worker.pid)
        ending = end_worker(worker, patience_s=EXIT_LIMIT_S if ended_itself else 0.0)
    word = json.dumps({"code": ending.code, "cpu_s": ending.cpu_s}).encode()
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        connection.settimeout(SHAKE_LIMIT_S)
        connection.sendall(LAST_WORD + word)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="megatron_mmrl.rewards.remote_server", description=__doc__)
    parser.add_argument("--address", required=True, metavar="A", help="where to listen: this node's address")
    options = parser.parse_args(argv)
    key = os.environ.pop(KEY)  # no worker needs it
    with WorkerServer(options.address, key) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
