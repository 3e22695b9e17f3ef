"""Start one SGLang server as processes of its own, wait until it answers, and end all of them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_mmrl import pulse
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.engine import EngineDiedError, EngineError
from megatron_mmrl.rollout.launch_settings import LaunchSettings, write_settings
from megatron_mmrl.rollout.server_args import Endpoint, EngineModel, environment, server_args

_TAIL_LINES = 30
_KILL_S = 10.0
_PROBE_S = 2.0
_SETTINGS = "settings.json"


class ServerProcess:
    """A server's processes: a launcher and its workers, one process group of their own."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        endpoint: Endpoint,
        *,
        log_path: Path,
        scratch_dir: Path,
        startup_timeout_s: float,
    ) -> None:
        self.endpoint = endpoint
        self._process, self._log_path, self._scratch_dir = process, log_path, scratch_dir
        self._startup_timeout_s, self._deadline = startup_timeout_s, time.monotonic() + startup_timeout_s
        self._ready = False

    @property
    def pid(self) -> int:
        """The launcher's process id, which is also the id of the group of all processes of the engine."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return when the server answers; at once if it did before.

        Raises:
            EngineError: the server ended, or did not answer in time; with the end of its log.
        """
        if self._ready:
            return
        with pulse.phase("engine start"), pulse.limited_wait(self._startup_timeout_s):
            while not self._answers():
                self.check_alive()
                if time.monotonic() > self._deadline:
                    raise EngineError(
                        f"the engine did not answer within startup_timeout_s={self._startup_timeout_s}; "
                        f"{self._log_tail()}"
                    )
                time.sleep(0.1)
        self._ready = True
        self._tidy_up_start()

    def check_alive(self) -> None:
        """Raise EngineDiedError, with the end of the log, when the server has ended."""
        status = self._process.poll()
        if status is not None:
            raise EngineDiedError(f"the engine ended with status {status}; {self._log_tail()}")

    def stop(self) -> None:
        """End every process of the engine at once; safe to call twice.

        SIGKILL, because there is nothing to save: SGLang's own shutdown notices SIGTERM only every 5 s.
        """
        deadline = time.monotonic() + _KILL_S
        while self._kill_group() and time.monotonic() < deadline:
            self._process.poll()  # reaps the launcher, which would otherwise stay in the group
            time.sleep(0.02)
        shutil.rmtree(self._scratch_dir, ignore_errors=True)
        for path in Path("/dev/shm").glob(f"sgl_shm_*_{self.pid}_*"):  # images on their way to the scheduler
            path.unlink(missing_ok=True)

    def _answers(self) -> bool:
        request = urllib.request.Request(
            f"{self.endpoint.url}/model_info", headers={"Authorization": f"Bearer {self.endpoint.api_key}"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through an HTTP proxy
        try:
            opener.open(request, timeout=_PROBE_S).close()
        except OSError:  # nobody listens yet, or not in time: URLError and TimeoutError are OSErrors
            return False
        return True

    def _tidy_up_start(self) -> None:
        """Remove the file with the keys, and the names of shared files that SGLang leaves behind when it is killed."""
        (self._scratch_dir / _SETTINGS).unlink()
        for process in [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]:
            mapped = Path(f"/proc/{process}/maps").read_text()
            for name in set(re.findall(r"/dev/shm/sgl\S+", mapped)):
                Path(name).unlink(missing_ok=True)

    def _kill_group(self) -> bool:
        """Kill all processes of the engine; False when there are none left."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return f"the end of {self._log_path}:\n" + "\n".join(lines)


def start_server(
    config: RolloutConfig, model: EngineModel, *, banned_token_ids: Sequence[int], log_path: Path
) -> ServerProcess:
    """Start a server on a free loopback port, with random keys. Does not wait for it: ``wait_until_ready`` does.

    To be called from the main thread: the kernel ends the server when the *thread* that started it ends.

    Args:
        config: sizes and time limits.
        model: model directory (weights are not read) and device.
        banned_token_ids: never sampled.
        log_path: the server's output is appended here.

    Raises:
        RuntimeError: called from another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("an engine must be started from the main thread: it ends with the thread that started it")
    endpoint = Endpoint(port=_free_port(), api_key=secrets.token_hex(16), admin_key=secrets.token_hex(16))
    scratch_dir = Path(tempfile.mkdtemp(prefix="mmrl-engine-"))
    settings = LaunchSettings(
        server_args=server_args(config, model, endpoint),
        banned_token_ids=tuple(banned_token_ids),
        deterministic=config.deterministic,
        parent_pid=os.getpid(),
    )
    write_settings(scratch_dir / _SETTINGS, settings)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_mmrl.rollout.launch_server", "--settings", str(scratch_dir / _SETTINGS)],
            env=environment(os.environ, config, model, scratch_dir),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return ServerProcess(
        process,
        endpoint,
        log_path=log_path,
        scratch_dir=scratch_dir,
        startup_timeout_s=config.startup_timeout_s,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
