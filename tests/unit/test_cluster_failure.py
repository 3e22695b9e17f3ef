"""The first cause of a run's end, as told from what the ranks wrote down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mmrl.cluster.failure import (
    FAILURE_DIR,
    Failure,
    failure_recorded,
    first_cause,
    forget_ends,
    read_failures,
)
from megatron_mmrl.cluster.local import rank_environments
from megatron_mmrl.config import ConfigError

LOST = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:36813"


def failure(rank: int, time: float, message: str = "x", kind: str = "ValueError") -> Failure:
    return Failure(time=time, rank=rank, type=kind, message=message)


def test_the_earliest_failure_is_the_cause() -> None:
    assert first_cause([failure(0, 2.5), failure(3, 2.1), failure(1, 2.3)]).rank == 3


def test_a_lost_peer_is_the_cause_only_if_nothing_else_is_known() -> None:
    killed = failure(1, 9.0, "killed by SIGKILL", "")
    lost = [failure(0, 1.0, LOST, "RuntimeError"), failure(2, 2.0, "[Errno 104] Connection reset by peer", "OSError")]
    assert first_cause([*lost, killed]) == killed
    assert first_cause(lost).rank == 0


@pytest.mark.parametrize(
    ("given", "line", "exit_code"),
    [
        (failure(1, 0.0, "loss is nan\n  at step 3"), "rank 1: ValueError: loss is nan", 1),
        (failure(0, 0.0, "", "AssertionError"), "rank 0: AssertionError", 1),
        (failure(2, 0.0, "killed by SIGSEGV", ""), "rank 2: killed by SIGSEGV", 1),
        (failure(1, 0.0, "run.seed=1.5: expected an integer", "ConfigError"), "run.seed=1.5: expected an integer", 2),
    ],
)
def test_a_failure_reads_as_one_line(given: Failure, line: str, exit_code: int) -> None:
    assert (str(given), given.exit_code) == (line, exit_code)


def test_a_rank_keeps_its_first_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURE_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError), failure_recorded():
        raise ConfigError("the first")
    with pytest.raises(KeyError), failure_recorded():
        raise KeyError("while cleaning up")
    (record,) = read_failures(tmp_path)
    assert (record.rank, record.type, record.message) == (3, "ConfigError", "the first")
    assert 'raise ConfigError("the first")' in record.traceback
    forget_ends(tmp_path, range(4))
    assert list(tmp_path.iterdir()) == []


def test_leaving_on_purpose_is_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILURE_DIR, str(tmp_path))
    with pytest.raises(SystemExit), failure_recorded():
        sys.exit(0)
    with failure_recorded():
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "exit_code", "last_line"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("raise ValueError('no\\nhope')", 1, "error: rank 5: ValueError: no"),
        ("raise ConfigError('run.seed is odd')", 2, "error: run.seed is odd"),
    ],
)
def test_a_rank_started_by_any_launcher_ends_with_its_cause(body: str, exit_code: int, last_line: str) -> None:
    code = f"""
from megatron_mmrl.cluster.failure import run_rank
from megatron_mmrl.config import ConfigError
def main():
    {body}
run_rank(main)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MMRL_")} | {"RANK": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == exit_code
    assert done.stderr.rstrip("\n").split("\n")[-1] == last_line


def test_a_rank_whose_launcher_is_gone_does_not_start() -> None:
    code = "from megatron_mmrl.lifetime import die_with_parent; die_with_parent(1); print('running')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the process that started this one is gone\n"


def test_ranks_see_what_torchrun_would_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("RANK", "9")  # left over from an outer launcher
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second = rank_environments(2, 1234, tmp_path)
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert {first[key] for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {"2"}
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == ("127.0.0.1", "1234")
    assert first["GLOO_SOCKET_IFNAME"] == "eth7"  # the user's choice stays
    assert first["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
