"""An engine's processes: they end with their parent, a start that fails says why, and nothing is left of either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.models.tiny import make_tiny_checkpoint
from megatron_mmrl.rollout.engine import EngineError
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_server import start_server

PARENT = """
import sys, time
from pathlib import Path
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_server import start_server

model = EngineModel(path=Path(sys.argv[1]), dtype="float32", device="cpu")
server = start_server(RolloutConfig(), model, banned_token_ids=[], log_path=Path(sys.argv[2]))
server.wait_until_ready()
print(server.pid, server.endpoint.port, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_tiny_checkpoint(path)
    return path


def left_over(group: int, port: int) -> list[object]:
    """Processes of a group that are not dead, and whoever listens on the port."""
    processes = [
        process
        for process in psutil.process_iter()
        if _group_of(process) == group and process.status() != psutil.STATUS_ZOMBIE
    ]
    connections = psutil.net_connections("tcp")
    return processes + [c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_nothing_outlives_a_parent_that_is_killed(model_dir, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model_dir), str(tmp_path / "engine.log")], stdout=subprocess.PIPE, text=True
    )
    group, port = map(int, parent.stdout.readline().split())
    assert len(left_over(group, port)) >= 4  # launcher, scheduler, detokenizer, the listening socket
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while left_over(group, port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_over(group, port) == []
    assert not list(Path("/dev/shm").glob(f"sgl_shm_*_{group}_*"))


def test_a_start_that_takes_too_long_is_ended(model_dir, tmp_path):
    config = RolloutConfig(startup_timeout_s=1.0)
    model = EngineModel(path=model_dir, dtype="float32", device="cpu")
    server = start_server(config, model, banned_token_ids=[], log_path=tmp_path / "engine.log")
    try:
        with pytest.raises(EngineError, match=r"did not answer within startup_timeout_s=1.0; the end of .*engine.log"):
            server.wait_until_ready()
    finally:
        server.stop()
    assert left_over(server.pid, server.endpoint.port) == []
    server.stop()  # may be repeated


def test_a_server_without_our_hooks_does_not_start(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "another_plugin")
    model = EngineModel(path=model_dir, dtype="float32", device="cpu")
    server = start_server(RolloutConfig(), model, banned_token_ids=[1], log_path=tmp_path / "engine.log")
    try:
        with pytest.raises(EngineError, match=r"(?s)ended with status 1.*banned tokens could be sampled"):
            server.wait_until_ready()
    finally:
        server.stop()
