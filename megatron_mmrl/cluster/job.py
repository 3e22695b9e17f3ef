"""A run that is to be started over nodes: what every launcher is given, whatever it starts it with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mmrl.checkpoint.output_dir import LOG_DIR
from megatron_mmrl.cluster.plan import Topology
from megatron_mmrl.config import Config

MODULE = "megatron_mmrl.train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run over nodes. Paths must lead to the same files on every node."""

    config_file: Path
    overrides: tuple[str, ...]
    config: Config  # what the two above say
    topology: Topology

    @property
    def output_dir(self) -> Path:
        """Absolute."""
        return Path(self.config.run.output_dir).resolve()

    def log_dir(self, attempt: int | str) -> Path:
        """Logs of one attempt at the run; the first is number 0."""
        return self.output_dir / LOG_DIR / f"attempt_{attempt}"

    def arguments(self, extra: Sequence[str] = ()) -> list[str]:
        """The ranks' command line, the same on every node; ``extra`` overrides come last and so win."""
        return ["--config", str(self.config_file.resolve()), *self.overrides, *extra]


def shell_line(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)
