"""``mmrl train``: check the configuration, then run ``megatron_mmrl.train`` on all ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.commands.ranks import add_config, add_overrides, start

if TYPE_CHECKING:
    from megatron_mmrl.config import Config

SUMMARY = "train a model"
DESCRIPTION = """\
Starts one process per rank on this machine, as many as the product of the
parallel sizes. On several machines, or under your own launcher:
  torchrun --nproc-per-node N -m megatron_mmrl.train --config F [key=value ...]

  mmrl train --config configs/quickstart.yaml run.output_dir=runs/first
  mmrl train --config configs/quickstart.yaml --dry-run rollout.num_engines=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and layout")


def run(options: argparse.Namespace) -> int:
    return train(options.config, options.overrides, dry_run=options.dry_run)


def train(config_file: Path, overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Check everything that needs no process, then train. Raises ConfigError for what cannot work."""
    from megatron_mmrl.checkpoint.output_dir import LOG_DIR, claim_output_dir
    from megatron_mmrl.cluster.preflight import preflight
    from megatron_mmrl.config import dump_config, load_config

    config = load_config(config_file, overrides)
    preflight(config)
    claim_output_dir(config)
    if dry_run:
        print(dump_config(config) + _describe_layout(config), end="")
        return 0
    arguments = ["--config", str(config_file), *overrides]
    return start("megatron_mmrl.train", arguments, config, Path(config.run.output_dir) / LOG_DIR, can_save=True)


def _describe_layout(config: Config) -> str:
    """The ranks and their places, as YAML comments."""
    from megatron_mmrl.parallel.layout import ParallelLayout

    layout = ParallelLayout.from_config(config.parallel)
    share = layout.world_size // config.rollout.num_engines
    lines = [f"# {layout.world_size} ranks, {config.rollout.num_engines} SGLang server(s)"]
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        place = f"tensor {at.tensor}, pipeline {at.pipeline}, context {at.context}, data {at.data}"
        engine = f", leads engine {rank // share}" if rank % share == 0 else ""
        lines.append(f"# rank {rank}: {place}{engine}")
    return "\n".join(lines) + "\n"
