"""A rank for test_cluster_local.py: starts an "engine" child, leaves both pids in a directory, then does as told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_mmrl.cluster.failure import failure_recorded, run_rank
from megatron_mmrl.cluster.stop import EXIT_REQUEUE, StopRequest

ENGINE = """
import sys, time
from megatron_mmrl.lifetime import die_with_parent
die_with_parent(int(sys.argv[1]))
open(sys.argv[2], "w").close()
time.sleep(600)
"""


def wait_for(directory: Path, pattern: str, count: int) -> None:
    while len(list(directory.glob(pattern))) < count:
        time.sleep(0.02)


def main() -> int:
    """argv: directory, what to do, the rank that does it."""
    directory, action, actor = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ready = directory / f"ready-{rank}"
    engine = subprocess.Popen([sys.executable, "-c", ENGINE, str(os.getpid()), str(ready)], start_new_session=True)
    (directory / f"pid-rank{rank}").write_text(str(os.getpid()))
    (directory / f"pid-engine{rank}").write_text(str(engine.pid))
    wait_for(directory, "ready-*", world_size)
    print(f"rank {rank} is up", flush=True)
    if action == "save":
        return save_when_asked(directory)
    if action == "finish":
        return 0
    if action == "deaf":  # a rank stuck in a collective: SIGTERM does not reach its Python code
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    act(action, directory, is_actor=rank == actor)
    time.sleep(600)
    return 0


def save_when_asked(directory: Path) -> int:
    """Listen only once ``directory``/listen is there, and end the "step" with ``directory``/step-ends."""
    wait_for(directory, "listen", 1)
    stop = StopRequest()
    stop.listen(to_sigterm=False)
    while not stop.asked:
        time.sleep(0.02)
    wait_for(directory, "step-ends", 1)
    return EXIT_REQUEUE


def act(action: str, directory: Path, *, is_actor: bool) -> None:
    if is_actor and action in ("raise", "deaf"):
        raise ValueError("reward/mean is nan\nat step 3")
    if is_actor and action == "exit":
        sys.exit(7)
    if is_actor and action == "slow_cleanup":
        try:
            with failure_recorded():
                raise ValueError("the cause")
        finally:
            (directory / "closing").touch()
            time.sleep(600)
    if not is_actor and action == "slow_cleanup":
        wait_for(directory, "closing", 1)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    if not is_actor and action == "lost_peer":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    if is_actor and action == "lost_peer":
        time.sleep(0.15)  # its peer notices first
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_rank(main)
