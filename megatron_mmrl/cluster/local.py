"""Start all ranks of a run on this machine, watch them, and end all of them together.

The ranks see the environment that torchrun gives them, so a module started here starts under
``torchrun --nproc-per-node N -m module`` as well. torchrun itself is not used, for three reasons: its rendezvous store
listens on every interface (torch 2.13), this one on loopback only; it leaves ranks that do not react to SIGTERM 30 s;
and it knows times to the second, too coarse to tell the rank that failed from those that lost it.

Rank 0 writes to the terminal through its standard output. Everything else the ranks write goes to
``<log_dir>/rank<N>.log``.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron_mmrl.cluster.failure import (
    FAILURE_DIR,
    LAUNCHER_PID,
    Failure,
    death,
    first_cause,
    forget_ends,
    read_failures,
)
from megatron_mmrl.cluster.stop import ASKING, EXIT_REQUEUE, ask, requests_held
from megatron_mmrl.lifetime import adopt_orphans, kill_descendants

GRACE_S = 5.0  # between SIGTERM and SIGKILL
_LOOK_EVERY_S = 0.2
_SETTLE_S = 0.3  # after a first failure: time for the rank that caused it to write down why
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a run ended: the last line for the user (empty when all is well) and the exit code."""

    message: str = ""
    exit_code: int = 0


def run_ranks(module: str, args: Sequence[str], world_size: int, log_dir: Path, *, can_save: bool = False) -> int:
    """Run ``python -m module *args`` as ``world_size`` ranks; return the exit code of the whole.

    To be called from the main thread of a process that has nothing else to do: on return, no descendant of this
    process is left, whatever happened. If the run failed or was interrupted, the last line on standard error is the
    cause: the rank that failed first and its exception, or the signal.

    Args:
        module: what each rank runs; its ``__main__`` calls ``run_rank``.
        args: its command line.
        world_size: number of ranks.
        log_dir: made if missing.
        can_save: the ranks save and leave when asked to; then SIGTERM or SIGUSR1 is passed on to them, and only a
            second one ends them at once. SIGINT and SIGHUP always do.

    Returns:
        0 when all ranks returned 0; EXIT_REQUEUE when they saved because they were asked to stop; 128 + signal number
        when interrupted; 2 when a rank refused the configuration; 1 otherwise.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    forget_ends(log_dir, range(world_size))
    adopt_orphans()
    with _Signals() as signals, socket.create_server(("127.0.0.1", 0)) as listener:
        ranks = _start(module, args, rank_environments(world_size, listener.getsockname()[1], log_dir), log_dir)
        try:
            store = _serve_store(listener)
            end = _watch(ranks, signals, log_dir, can_save=can_save)
            _stop(ranks, signals)
            del store  # served the ranks until here
        finally:
            kill_descendants()
    if end.message:
        _report(end.message, log_dir)
    return end.exit_code


def rank_environments(world_size: int, port: int, log_dir: Path) -> list[dict[str, str]]:
    """torchrun's variables for each rank, and defaults for what the user has not set."""
    # One machine: nothing needs to listen beyond loopback.
    defaults = default_environment(world_size) | {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 is a client of the store as well: the launcher serves it
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHER_PID: str(os.getpid()),
        FAILURE_DIR: str(log_dir.resolve()),
    }
    base = defaults | dict(os.environ) | shared
    return [base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def default_environment(ranks_on_node: int) -> dict[str, str]:
    """For a rank under any launcher, where the user has not set it."""
    return {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks_on_node)),
        "PYTHONUNBUFFERED": "1",  # a log file shows what led up to a crash
        "PYTHONFAULTHANDLER": "1",
    }


class _Signals(AbstractContextManager["_Signals"]):
    """Signals as values to wait for, instead of interruptions at any line. Restores the handlers at the end."""

    def __enter__(self) -> _Signals:
        self._arrived: deque[int] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        wanted = (*_INTERRUPTS, signal.SIGCHLD)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in wanted}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout_s: float) -> int | None:
        """The number of the next interrupt that has arrived; None when a child changed state or time is up."""
        if not self._arrived and select.select([self._reader], [], [], timeout_s)[0]:
            self._arrived.extend(self._reader.recv(4096))  # one byte per signal: its number
        while self._arrived:
            if (number := self._arrived.popleft()) in _INTERRUPTS:
                return number
        return None


def _start(
    module: str, args: Sequence[str], environments: Sequence[Mapping[str, str]], log_dir: Path
) -> list[subprocess.Popen[bytes]]:
    ranks = []
    for rank, environment in enumerate(environments):
        with (log_dir / f"rank{rank}.log").open("ab") as log, requests_held():
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *args],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in the terminal reaches this process alone
                )
            )
    return ranks


def _serve_store(listener: socket.socket) -> object:
    """Serve torch's rendezvous store on ``listener`` for as long as the returned object lives."""
    import torch.distributed as dist  # after the ranks were started: the import takes seconds, theirs too

    host, port = listener.getsockname()
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno()))


def _watch(ranks: Sequence[subprocess.Popen[bytes]], signals: _Signals, log_dir: Path, *, can_save: bool) -> End:
    """Wait until all ranks are done, one has failed, or a signal asks for the end."""
    ends_well = (0, EXIT_REQUEUE) if can_save else (0,)
    while True:
        interrupt = signals.wait(_LOOK_EVERY_S)
        if interrupt in ASKING and can_save:
            can_save = False  # a second request ends the run at once
            print("asked to stop: saving at the end of this step; a second signal ends the run now", file=sys.stderr)
            for rank in ranks:
                if rank.poll() is None:
                    ask(rank.pid)
        elif interrupt is not None:
            return End(message=f"interrupted ({signal.Signals(interrupt).name})", exit_code=128 + interrupt)
        codes = [rank.poll() for rank in ranks]
        if all(code in ends_well for code in codes):
            return End(exit_code=EXIT_REQUEUE if EXIT_REQUEUE in codes else 0)
        if any(code not in (None, *ends_well) for code in codes) or read_failures(log_dir):
            cause = _find_cause(ranks, log_dir)
            return End(message=cause.report, exit_code=cause.exit_code)


def _find_cause(ranks: Sequence[subprocess.Popen[bytes]], log_dir: Path) -> Failure:
    deaths: dict[int, Failure] = {}
    deadline = time.monotonic() + _SETTLE_S
    while True:
        for rank, process in enumerate(ranks):
            code = process.poll()
            if code and rank not in deaths:
                deaths[rank] = death(rank, code)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    records = {failure.rank: failure for failure in read_failures(log_dir)}
    return first_cause((deaths | records).values())


def _stop(ranks: Sequence[subprocess.Popen[bytes]], signals: _Signals) -> None:
    """SIGTERM to every rank; back when all have ended, after ``GRACE_S``, or at a second interrupt."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + GRACE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if signals.wait(_LOOK_EVERY_S) is not None:
            return


def _report(message: str, log_dir: Path) -> None:
    if sys.stdout.isatty():
        print("\x1b[?25h")  # the progress line hides the cursor, and its owner was killed
    print(f"logs of the ranks: {log_dir}/rank*.log", file=sys.stderr)
    print(message, file=sys.stderr, flush=True)
