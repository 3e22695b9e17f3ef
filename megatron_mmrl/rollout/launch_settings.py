"""What the trainer tells an engine: a JSON file that only its owner can read, so that no key is an argument."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

SETTINGS_VARIABLE = "MEGATRON_MMRL_ENGINE_SETTINGS"
"""Environment variable that names the file; every process of the engine inherits it."""

ServerArgValue = str | int | float | bool | list[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """Content of the settings file."""

    server_args: Mapping[str, ServerArgValue]  # fields of SGLang's ServerArgs, the two keys among them
    banned_token_ids: tuple[int, ...]  # never sampled, whatever their logits
    deterministic: bool
    parent_pid: int  # the trainer rank; the engine ends when it ends


def write_settings(path: Path, settings: LaunchSettings) -> None:
    """Write ``settings`` to a new file with mode 0600. Raises FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(settings), file)


def read_settings(path: Path) -> LaunchSettings:
    """Read a settings file. Raises PermissionError if anybody but its owner can read it."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise PermissionError(f"{path} has mode {mode:o}: it holds keys, so only its owner may read it (chmod 600)")
    content = json.loads(path.read_text())
    return LaunchSettings(
        server_args=content["server_args"],
        banned_token_ids=tuple(content["banned_token_ids"]),
        deterministic=content["deterministic"],
        parent_pid=content["parent_pid"],
    )


def inherited_settings() -> LaunchSettings | None:
    """The settings of the engine that this process belongs to; None outside an engine of ours."""
    path = os.environ.get(SETTINGS_VARIABLE)
    return None if path is None else read_settings(Path(path))
