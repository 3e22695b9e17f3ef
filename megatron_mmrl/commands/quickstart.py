"""``mmrl quickstart``: prepare the digits task and a tiny model if they are missing, then train."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import megatron_mmrl
from megatron_mmrl.commands.ranks import add_overrides
from megatron_mmrl.commands.train import train

SUMMARY = "prepare a small task and train on it"
DESCRIPTION = """\
Writes scanned digits and a tiny random Qwen2.5-VL to runs/prepared/ (once),
then trains as "mmrl train --config configs/quickstart.yaml" does: a short
supervised warm-up, then GRPO. Results are under runs/quickstart/. Typing the
same command again continues an interrupted run.

  mmrl quickstart
  mmrl quickstart run.seed=1 run.output_dir=runs/seed1
  mmrl quickstart parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=2
"""
CONFIG_FILE = Path(megatron_mmrl.__file__).parent.parent / "configs" / "quickstart.yaml"
PREPARED_DIR = Path("runs/prepared")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--task", choices=("read", "add", "both"), help="what is asked of the digits")


def run(options: argparse.Namespace) -> int:
    if not CONFIG_FILE.is_file():
        from megatron_mmrl.config import ConfigError

        raise ConfigError(f"{CONFIG_FILE} is missing; run quickstart from a clone of the repository")
    prepared = prepare_quickstart(options.task)
    overrides = ("run.resume=auto", *options.overrides)  # typing the same command again continues it
    if options.task is not None:
        overrides = (
            f"run.output_dir=runs/quickstart_{options.task}",
            f"model.path={prepared}/model",
            f"data.train_files=[{prepared}/train.parquet]",
            f"data.eval_files=[{prepared}/test.parquet]",
            *overrides,
        )
    return train(CONFIG_FILE, overrides)


def prepare_quickstart(task: str | None = None) -> Path:
    """Write the digits task and its tiny model to ``runs/prepared`` unless it is there; return the directory."""
    directory = PREPARED_DIR.with_name(f"prepared_{task}") if task else PREPARED_DIR
    if directory.is_dir():
        return directory
    from megatron_mmrl.data.digits import DigitsOptions
    from megatron_mmrl.quickstart import prepare

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print(f"preparing {directory}: scanned digits and a tiny random Qwen2.5-VL")
    draft = directory.with_name(f".{directory.name}.draft")
    draft.mkdir(parents=True, exist_ok=True)
    prepare(draft, DigitsOptions(task=task) if task else None)  # type: ignore[arg-type]  # argparse checked the choice
    draft.rename(directory)  # appears whole
    return directory
