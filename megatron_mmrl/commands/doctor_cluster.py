"""``mmrl doctor cluster``: do the ranks of a configuration agree, and how fast do they reach each other."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from megatron_mmrl.commands.ranks import add_config, add_overrides, start

SUMMARY = "what ranks check before they train, alone"
DESCRIPTION = """\
Starts the ranks of a configuration on this machine, has them compare versions,
configuration, paths, memory and clocks and sum tensors in each of their groups,
and prints what they found. Reads no weights and starts no engine. Ends with 1
when something would end a run. Over several nodes, from each of them:
  torchrun --nnodes N ... -m megatron_mmrl.doctor.cluster --config F [key=value ...]

  mmrl doctor cluster --config configs/quickstart.yaml
  mmrl doctor cluster --config configs/quickstart.yaml parallel.data_parallel_size=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Returns 0 when the ranks agree, else 1. Raises ConfigError for a configuration that cannot be used."""
    from megatron_mmrl.config import load_config

    config = load_config(options.config, options.overrides)
    arguments = ["--config", str(options.config), *options.overrides]
    logs = Path(tempfile.mkdtemp(prefix="mmrl-doctor-"))
    code = start("megatron_mmrl.doctor.cluster", arguments, config, logs)
    if code == 0:
        shutil.rmtree(logs)
    return code
