"""Workers behind a connection: the verdicts of local ones, hangs that cost their limit once, losses for free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.rewards.dispatch import Dispatcher
from megatron_mmrl.rewards.pool import RewardPool, worker_spec
from megatron_mmrl.rewards.process import Job, WorkerProcess
from megatron_mmrl.rewards.remote import ENDPOINTS, KEY, Connection, Endpoint, endpoints_of
from tests.unit.test_rewards_pool import group, is_alive

CONFIG = RewardConfig(terms=[RewardTerm(name="odd_rewards:behave")], timeout_s=1.0)
QUESTION = {
    "prompt": {"id": "", "source": "", "messages": [], "answer": "7", "meta": {}},
    "tokens": 1,
    "finish": "stop",
}


def environment() -> dict[str, str]:
    return {**os.environ, KEY: "a key", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def server(plugin_dir: Path) -> Iterator[tuple[subprocess.Popen[str], Endpoint]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_mmrl.rewards.remote_server", "--address", "127.0.0.1"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, Endpoint(host="127.0.0.1", port=int(process.stdout.readline()), key="a key")
    process.kill()
    process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def test_verdicts_are_those_of_local_workers_and_nothing_stays(server: tuple[subprocess.Popen[str], Endpoint]) -> None:
    process, endpoint = server
    texts = [f"text number {index}" for index in range(300)] + ["nan", "raise", "print", "prompt"]
    with RewardPool(CONFIG) as local, RewardPool(CONFIG, [endpoint, endpoint]) as both:
        assert len(workers_of(process)) == 2
        workers = workers_of(process)
        assert both.score([group(texts)])[0].scores == local.score([group(texts)])[0].scores
        assert all(sum(worker.cpu_times()[:2]) > 0 for worker in workers)
    psutil.wait_procs(workers, timeout=5)
    assert not [worker for worker in workers if is_alive(worker.pid)]


def test_what_a_job_does_to_its_worker_is_known_from_afar(server: tuple[subprocess.Popen[str], Endpoint]) -> None:
    process, endpoint = server
    remote = Dispatcher(worker_spec(CONFIG), 0, [endpoint.connect])  # no other worker: all of this is answered there
    try:
        futures = remote.submit([{**QUESTION, "text": text} for text in ("spin", "sleep", "exit", "segfault", "four")])
        spin, sleep, gone, fault, good = (future.result(timeout=60) for future in futures)
        assert spin.timed_out
        assert (sleep.timed_out, sleep.was_busy) == (True, False)
        assert spin.error == "scoring took longer than the limit of 1 s"
        assert gone.error == "scoring ended the worker, code 3"
        assert fault.error == "scoring ended the worker, code -11"
        assert good.value == {"odd_rewards:behave": 4.0}
        assert len(workers_of(process)) == 1
    finally:
        remote.close()


@pytest.mark.parametrize(("text", "computes"), [("spin", True), ("sleep", False)])
def test_the_server_tells_a_hang_that_computes_from_one_that_waits(
    server: tuple[subprocess.Popen[str], Endpoint], text: str, computes: bool
) -> None:
    process, endpoint = server
    worker = WorkerProcess(worker_spec(CONFIG), endpoint.connect)
    while not worker.ready:
        worker.flush()
        worker.receive()
        time.sleep(0.01)
    (far_end,) = workers_of(process)
    before = sum(far_end.cpu_times()[:2])
    worker.assign([Job(index=0, question={**QUESTION, "text": text})])
    time.sleep(0.3)
    while computes and sum(far_end.cpu_times()[:2]) < before + 0.6:  # half of the limit, however busy the machine is
        time.sleep(0.01)
    ending, was_busy = worker.end()
    assert (ending.code, was_busy) == (-signal.SIGKILL, computes)
    psutil.wait_procs([far_end], timeout=5)
    assert not is_alive(far_end.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "silent"])
def test_a_lost_server_costs_time_only(
    server: tuple[subprocess.Popen[str], Endpoint], number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    process, endpoint = server
    said, deadline = "", time.monotonic() + 30
    with RewardPool(CONFIG, [endpoint, endpoint]) as pool:
        for victim in (*workers_of(process), psutil.Process(process.pid)):
            victim.send_signal(number)
        while "a reward worker is lost" not in said:  # the worker here may be quick enough to leave the lost nothing
            assert time.monotonic() < deadline, said
            texts = [f"text number {index} at {time.monotonic()}" for index in range(200)]
            (scored,) = pool.score([group(texts)])
            assert scored.scores is not None
            assert [score.total for score in scored.scores] == [float(len(text)) for text in texts]
            assert pool.counters() == {"reward/timeouts": 0.0, "reward/errors": 0.0}
            said += capfd.readouterr().err


def test_a_server_that_is_not_there_is_done_without(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with RewardPool(
        RewardConfig(terms=[RewardTerm(name="format")]), [Endpoint(host="127.0.0.1", port=port, key="k")] * 3
    ):
        pass
    assert capfd.readouterr().err.count("is lost") == 1


def test_a_wrong_key_is_refused_on_both_sides(server: tuple[subprocess.Popen[str], Endpoint]) -> None:
    process, endpoint = server
    with pytest.raises(RuntimeError, match="refused the key in MMRL_REWARD_KEY"):
        Connection(Endpoint(host=endpoint.host, port=endpoint.port, key="another"))
    with socket.create_connection((endpoint.host, endpoint.port), timeout=10) as stranger:
        assert len(stranger.recv(32)) == 32
        stranger.sendall(json.dumps({"terms": [["x", "os:system", {}]]}).encode().ljust(64))
        assert stranger.recv(1) == b""
    assert workers_of(process) == []
    assert "another" not in repr(Endpoint(host="h", port=1, key="another"))


def test_workers_are_dealt_out_to_those_who_score() -> None:
    given = {ENDPOINTS: "10.0.0.1:70:2,10.0.0.2:80:1", KEY: "k"}
    first, second = endpoints_of(given, 0, 2), endpoints_of(given, 1, 2)
    assert [(e.host, e.port) for e in first] == [("10.0.0.1", 70), ("10.0.0.2", 80)]
    assert [(e.host, e.port) for e in second] == [("10.0.0.1", 70)]
    assert endpoints_of({}, 0, 1) == []
