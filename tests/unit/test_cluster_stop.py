"""Requests to stop: none is lost, none ends a process that knows nothing of them."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

HOLDS = """
import os, signal, subprocess, sys, time
from megatron_mmrl.cluster.stop import StopRequest, ask, requests_held
"""


def output(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", HOLDS + code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_request_before_a_rank_listens_waits_for_it() -> None:
    rank = "from megatron_mmrl.cluster.stop import StopRequest; import time; input(); stop = StopRequest(); "
    rank += "stop.listen(to_sigterm=False); time.sleep(0.2); print(stop.asked)"
    code = f"""
with requests_held():
    rank = subprocess.Popen([sys.executable, "-c", {rank!r}], stdin=subprocess.PIPE, text=True)
ask(rank.pid)
time.sleep(0.1)
rank.communicate("listen now\\n")
sys.exit(rank.returncode)
"""
    assert output(code) == (0, "True\n")


def test_nobody_asked() -> None:
    code = "stop = StopRequest(); stop.listen(to_sigterm=True); time.sleep(0.2); print(stop.asked)"
    assert output(code) == (0, "False\n")


@pytest.mark.parametrize(
    ("number", "to_sigterm", "end"),
    [
        (signal.SIGUSR1, False, (0, "True\n")),
        (signal.SIGUSR1, True, (0, "True\n")),
        (signal.SIGTERM, True, (0, "True\n")),
        (signal.SIGTERM, False, (-signal.SIGTERM, "")),
    ],
)
def test_what_counts_as_a_request(number: signal.Signals, to_sigterm: bool, end: tuple[int, str]) -> None:
    code = f"""
stop = StopRequest(); stop.listen(to_sigterm={to_sigterm})
os.kill(os.getpid(), {int(number)})
os.kill(os.getpid(), {int(number)})
time.sleep(0.2)
print(stop.asked)
"""
    assert output(code) == end


def test_what_a_rank_starts_never_hears_of_a_request() -> None:
    code = """
stop = StopRequest(); stop.listen(to_sigterm=False)
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
ask(child.pid)
time.sleep(0.2)
child.communicate(b"go on\\n")
print(child.returncode, stop.asked)
"""
    assert output(code) == (0, "0 False\n")


def test_a_launcher_itself_hears_requests_again_after_it_has_started_its_ranks() -> None:
    code = """
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
with requests_held():
    ask(os.getpid())
    print(heard)
print(heard)
"""
    assert output(code) == (0, "[]\n[1]\n")
