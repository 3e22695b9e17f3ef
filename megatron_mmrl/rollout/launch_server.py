"""Run one SGLang server: ``python -m megatron_mmrl.rollout.launch_server --settings FILE``.

SGLang's own command line would show the keys in every process listing; here they come from a file that only its owner
can read. The server ends with its parent, however the parent ends. Where SGLang spawns its workers they run this
module as ``__mp_main__``, so what every process needs is done at its bottom, before anything of SGLang is imported.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.lifetime import die_with_parent
from megatron_mmrl.rollout.launch_settings import SETTINGS_VARIABLE, LaunchSettings, read_settings

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

_LISTEN_TIMEOUT_S = 60.0


def main() -> None:
    """Read the settings, start the server, return when it has ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of LaunchSettings, mode 0600")
    path: Path = parser.parse_args().settings.resolve()
    settings = read_settings(path)
    os.environ[SETTINGS_VARIABLE] = str(path)
    die_with_parent(settings.parent_pid)  # and not start at all when the parent has ended meanwhile
    serve(settings)


def serve(settings: LaunchSettings) -> None:
    """Start SGLang with ``settings`` in this process and its children; blocks.

    Raises:
        RuntimeError: SGLang did not pick up our hooks; or deterministic sampling is asked for and this machine's
            matrix products depend on the batch.
    """
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    from megatron_mmrl.rollout import sglang_hooks
    from megatron_mmrl.rollout.batch_invariance import require_independent_rows

    if settings.deterministic and settings.server_args["device"] == "cpu":
        require_independent_rows(str(settings.server_args["dtype"]))
    load_plugins()
    if not sglang_hooks.installed():
        raise RuntimeError(
            "SGLang did not find the plugin of megatron_mmrl, so banned tokens could be sampled: is the package "
            "installed (pip install -e .), and does SGLANG_PLUGINS, if set, name it?"
        )
    if missing := sglang_hooks.missing_hooks():
        raise RuntimeError(f"SGLang did not take the hooks on {missing}; the log above says why")
    # Our own warm-up: SGLang's waits a whole second at a time and generates tokens that nobody needs.
    launch_server(ServerArgs(**settings.server_args), execute_warmup_func=_wait_until_listening)


def _wait_until_listening(server_args: ServerArgs) -> bool:
    """Return True once the HTTP port accepts connections, after which SGLang posts to itself; False at the limit."""
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    deadline = time.monotonic() + _LISTEN_TIMEOUT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((server_args.host, server_args.port)) == 0:
                get_global_state().tokenizer_manager.server_status = ServerStatus.Up
                return True
        time.sleep(0.02)
    return False


if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()
    declare_torchvision_ops()

if __name__ == "__main__":
    main()
