"""``python -m megatron_mmrl.cluster.tied PID ARGUMENT...``: Python with these arguments, dying with its parent PID.

For parents with many threads, where code between fork and exec may hang: what it takes is done by the child itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_mmrl.cluster.stop import REQUEST
from megatron_mmrl.lifetime import die_with_parent


def tied(parent_pid: int, arguments: Sequence[str]) -> list[str]:
    """The command, for a thread of ``parent_pid`` that lives as long as the process is to."""
    return [sys.executable, "-m", "megatron_mmrl.cluster.tied", str(parent_pid), *arguments]


def main(argv: Sequence[str]) -> NoReturn:
    """Become Python with the given arguments; the tie outlasts exec."""
    die_with_parent(int(argv[0]))
    signal.pthread_sigmask(signal.SIG_SETMASK, {REQUEST})  # Ray's threads block SIGINT, and children inherit that
    os.execv(sys.executable, [sys.executable, *argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
