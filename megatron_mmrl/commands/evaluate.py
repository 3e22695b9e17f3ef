"""``mmrl eval``: check configuration and checkpoint, then run ``megatron_mmrl.evaluate`` on all ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_mmrl.commands.ranks import add_config, add_overrides, start

SUMMARY = "evaluate a checkpoint on the held-out prompts"
DESCRIPTION = """\
Answers the held-out prompts (data.eval_files) greedily and prints their
accuracy. A checkpoint is a step of a run or a Hugging Face directory.

  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/step_100
  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/hf run.max_eval_prompts=100
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_overrides(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="D",
        help="checkpoints/step_N of a run, or a Hugging Face model",
    )


def run(options: argparse.Namespace) -> int:
    from megatron_mmrl.checkpoint.output_dir import LOG_DIR
    from megatron_mmrl.cluster.preflight import preflight
    from megatron_mmrl.config import ConfigError, load_config

    config = load_config(options.config, options.overrides)
    preflight(config, need="eval_files")
    if not options.checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {options.checkpoint} is not a directory")
    arguments = ["--config", str(options.config), "--checkpoint", str(options.checkpoint), *options.overrides]
    return start("megatron_mmrl.evaluate", arguments, config, Path(config.run.output_dir) / LOG_DIR / "eval")
