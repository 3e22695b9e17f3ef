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

from megatron_mmrl.config import ConfigError
from megatron_mmrl.lifetime import die_with_parent

FAILURE_DIR = "MMRL_FAILURE_DIR"
LAUNCHER_PID = "MMRL_LAUNCHER_PID"

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
            _write(error)


def run_rank(main: Callable[[], int | None]) -> None:
    """Run a rank's ``main`` under any launcher and end the process; to be called from the main thread.

    The rank dies with its launcher. Its first exception is recorded, printed and ends the process at once, without
    the clean-up of libraries that would wait for other ranks.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    die_with_parent(int(launcher) if launcher else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt would wait for the collective it interrupts
    sys.excepthook = _end_with_cause
    with failure_recorded():
        code = main()
    sys.exit(code)


def read_failures(directory: Path) -> list[Failure]:
    """All records in ``directory``."""
    return [Failure(**json.loads(path.read_text())) for path in directory.glob("error-rank*.json")]


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The earliest failure that does not merely report a lost peer; if all do, the earliest."""
    return min(failures, key=lambda failure: (failure.lost_peer, failure.time))


def forget_failures(directory: Path) -> None:
    """Remove records that an earlier run left."""
    for path in directory.glob("error-rank*.json"):
        path.unlink()


def _as_failure(error: BaseException) -> Failure:
    return Failure(
        time=time.time(),
        rank=int(os.environ.get("RANK", "0")),
        type=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
    )


def _write(error: BaseException) -> None:
    directory = os.environ.get(FAILURE_DIR)
    if directory is None:  # not started by us: the excepthook's last line is all there is
        return
    failure = _as_failure(error)
    path = Path(directory) / f"error-rank{failure.rank}.json"
    if not path.exists():
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(failure)))
        draft.rename(path)  # appears whole


def _end_with_cause(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    failure = _as_failure(error)
    print(f"{failure.traceback}error: {failure}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.exit_code)
