"""What the commands that start ranks share: configuration keys on the command line, and the start itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mmrl.config import Config

EPILOG = """\
key=value sets a configuration key and may be repeated; values are YAML:
  optim.lr=1e-3  run.num_steps=20  data.train_files=[a.parquet,b.parquet]
An unknown key, a wrong type or a layout that the model cannot be cut into
ends with exit code 2 before any process is started.
"""


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Accept ``key=value``, anywhere on the command line."""
    parser.epilog = EPILOG
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a configuration key")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Accept ``--config F``."""
    parser.add_argument("--config", type=Path, required=True, metavar="F", help="YAML file")


def start(module: str, arguments: Sequence[str], config: Config, log_dir: Path, *, can_save: bool = False) -> int:
    """Run ``python -m module arguments`` on all ranks of ``config`` on this machine; return the exit code."""
    from megatron_mmrl.cluster.local import run_ranks

    return run_ranks(module, list(arguments), config.parallel.world_size, log_dir, can_save=can_save)
