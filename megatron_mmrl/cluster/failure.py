"""Why a run ended: ranks write down what they raised and when, and the launcher names the first of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from megatron_mmrl.cluster.stop import EXIT_REQUEUE
from megatron_mmrl.config import ConfigError
from megatron_mmrl.lifetime import die_with_parent

FAILURE_DIR = "MMRL_FAILURE_DIR"
LAUNCHER_PID = "MMRL_LAUNCHER_PID"
OUTPUT_TO_FILES = "MMRL_OUTPUT_TO_FILES"
STALLED = "StalledError"  # type of a failure that no rank raised: the watchdog found that the run got nowhere

# What gloo, NCCL and sockets say when the process at the other end has gone: a consequence, hardly ever the cause.
_LOST_PEER = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "remote process has exited")


_LINE_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One rank's end, as written to ``error-rank<N>.json`` or as seen by the launcher."""

    time: float  # seconds since the epoch
    rank: int
    type: str  # name of the exception's class; empty: the rank left no exception
    message: str
    traceback: str = ""

    def __str__(self) -> str:
        message = self.message.strip().partition("\n")[0][:_LINE_CHARS]  # the last line of the output has to say it all
        if self.type == ConfigError.__name__:
            return message
        return f"rank {self.rank}: " + ": ".join(part for part in (self.type, message) if part)

    @property
    def report(self) -> str:
        """What a launcher prints last: the line, and before it what all ranks did when none got on."""
        return f"{self.traceback if self.type == STALLED else ''}error: {self}"

    @property
    def exit_code(self) -> int:
        """2 for a configuration that cannot be used, as everywhere; else 1."""
        return 2 if self.type == ConfigError.__name__ else 1

    @property
    def lost_peer(self) -> bool:
        """Whether this only reports that another rank went away."""
        return any(sign in self.message.lower() for sign in _LOST_PEER)


class failure_recorded:  # noqa: N801  # a context manager that reads as a verb
    """Write down the exception that leaves the block, then let it pass; only the first of a rank is kept.

    Put it around the work itself, inside any ``finally`` that closes connections: the launcher ends the other ranks
    as soon as the record is there, and so the clean-up cannot wait for them for long.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, (SystemExit, GeneratorExit)):
            _write(_as_failure(error))


def run_rank(main: Callable[[], int | None]) -> None:
    """Run a rank's ``main`` under any launcher and end the process; to be called from the main thread.

    The rank dies with its launcher. Its first exception is recorded, printed and ends the process at once, without
    the clean-up of libraries that would wait for other ranks.
    """
    if OUTPUT_TO_FILES in os.environ:
        _write_to_files(Path(os.environ[FAILURE_DIR]))
    launcher = os.environ.get(LAUNCHER_PID)
    die_with_parent(int(launcher) if launcher else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt would wait for the collective it interrupts
    sys.excepthook = _end_with_cause
    with failure_recorded():
        code = main()
    if code == EXIT_REQUEUE and FAILURE_DIR in os.environ:
        _stopped_file(Path(os.environ[FAILURE_DIR]), _rank()).touch()
        if OUTPUT_TO_FILES in os.environ:  # torchrun's agent would end the ranks that are still leaving
            code = 0
    sys.exit(code)


def end_run(failure: Failure) -> NoReturn:
    """Record what ended the run, print it and end this process at once; from any thread, whatever the others do."""
    _write(failure)
    _end(failure)


def record_death(directory: Path, rank: int, exit_code: int) -> None:
    """Write down how ``rank`` ended, as its parent saw it, unless the rank left word itself."""
    _write_file(_record_file(directory, rank), death(rank, exit_code))


def death(rank: int, exit_code: int) -> Failure:
    """The end of a rank as its parent sees it, now; ``exit_code``: negative for a signal."""
    how = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exited with code {exit_code}"
    if exit_code == -signal.SIGALRM:  # the watchdog's last net
        how += f": a call held Python's lock, and nothing else could run; stacks-rank{rank}.txt has its line"
    return Failure(time=time.time(), rank=rank, type="", message=how)


def read_failures(directory: Path) -> list[Failure]:
    """All records in ``directory``."""
    return [Failure(**json.loads(path.read_text())) for path in directory.glob("error-rank*.json")]


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The earliest failure that does not merely report a lost peer; if all do, the earliest."""
    return min(failures, key=lambda failure: (failure.lost_peer, failure.time))


def all_stopped(directory: Path, ranks: Iterable[int]) -> bool:
    """Whether all of ``ranks`` saved and left because they were asked to; for launchers that hide exit codes."""
    return all(_stopped_file(directory, rank).exists() for rank in ranks)


def forget_ends(directory: Path, ranks: Iterable[int]) -> None:
    """Remove what ``ranks`` left about their end in an earlier run."""
    for rank in ranks:
        _record_file(directory, rank).unlink(missing_ok=True)
        _stopped_file(directory, rank).unlink(missing_ok=True)


def _record_file(directory: Path, rank: int) -> Path:
    return directory / f"error-rank{rank}.json"


def _stopped_file(directory: Path, rank: int) -> Path:
    return directory / f"stopped-rank{rank}"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _write_to_files(directory: Path) -> None:
    """As under our own launcher: all output goes to ``rank<N>.log``, but for rank 0's standard output."""
    log = os.open(directory / f"rank{_rank()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 2)
    if _rank() != 0:
        os.dup2(log, 1)
    os.close(log)


def _as_failure(error: BaseException) -> Failure:
    return Failure(
        time=time.time(),
        rank=_rank(),
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )


def _write(failure: Failure) -> None:
    directory = os.environ.get(FAILURE_DIR)
    if directory is not None:  # else not started by us: the last line of the output is all there is
        _write_file(_record_file(Path(directory), _rank()), failure)


def _write_file(path: Path, failure: Failure) -> None:
    if not path.exists():
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(failure)))
        draft.rename(path)  # appears whole


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _end(_as_failure(error))


def _end(failure: Failure) -> NoReturn:
    sys.stdout.flush()
    # In the place of sys.stderr torch.distributed has a buffer while an excepthook runs, and prints it only after that.
    print(f"{failure.traceback}error: {failure}", file=sys.__stderr__, flush=True)
    os._exit(failure.exit_code)
