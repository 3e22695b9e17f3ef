"""``mmrl eval``: check configuration and checkpoint, then run ``megatron_mmrl.evaluate`` on all ranks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.commands.ranks import add_config, add_overrides, start

if TYPE_CHECKING:
    from megatron_mmrl.config import Config

SUMMARY = "evaluate a checkpoint on the held-out prompts"
DESCRIPTION = """\
Answers the held-out prompts (data.eval_files) and prints how many answers are
right: one greedy answer to each, or with --samples K at a temperature Pass@1[K]
(mean accuracy of the K answers) and pass@k (the unbiased estimate for the powers
of two up to K). A checkpoint is a step of a run or a Hugging Face directory.

  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/step_100
  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/hf run.max_eval_prompts=100
  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/hf --samples 8 --temperature 0.6 \\
      --by ability --json result.json --output answers.jsonl
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
    parser.add_argument(
        "--data", action="append", default=[], metavar="F", help="questions, in place of data.eval_files; repeatable"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers to each question (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus of the draws (default: 1)")
    parser.add_argument("--top-k", type=int, default=-1, metavar="N", help="so many most likely tokens (default: all)")
    parser.add_argument("--pass-k", type=int, action="append", metavar="K", help="which pass@k to report; repeatable")
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="also group by this column of the rows, such as subject, level or metadata.task; repeatable",
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="judge by the answer rules of the evaluation sets, not reward.terms"
    )
    parser.add_argument("--correct", metavar="TERM", help="an answer is right when this reward term exceeds 0.5")
    parser.add_argument("--json", type=Path, metavar="F", help="write the result to this file as well")
    parser.add_argument("--output", type=Path, metavar="F", help="write each answer as one line of JSON")


def run(options: argparse.Namespace) -> int:
    from megatron_mmrl.checkpoint.output_dir import LOG_DIR

    config = checked(options)
    return start("megatron_mmrl.evaluate", _arguments(options), config, Path(config.run.output_dir) / LOG_DIR / "eval")


def checked(options: argparse.Namespace) -> Config:
    """The configuration with ``--data`` applied. Raises ConfigError for what cannot work, before any process starts."""
    from megatron_mmrl.cluster.preflight import preflight
    from megatron_mmrl.config import ConfigError, load_config

    overrides = [*options.overrides]
    if options.data:
        overrides.append(f"data.eval_files={list(options.data)}")
    if options.benchmark:
        overrides += ["reward.preset=null", "reward.legacy=false", "reward.terms=[{name: benchmark}]"]
    config = load_config(options.config, overrides)
    preflight(config, need="eval_files")
    _check_checkpoint(options.checkpoint)
    _check_sampling(options)
    for file in (options.json, options.output):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file}: {file.parent} is not a directory")
        if file is not None and file.is_dir():
            raise ConfigError(f"{file} is a directory; name a file in it")
    return config


def _check_checkpoint(directory: Path) -> None:
    from megatron_mmrl.checkpoint.manifest import STATE_FILE
    from megatron_mmrl.config import ConfigError

    if not directory.is_dir():
        raise ConfigError(f"--checkpoint {directory} is not a directory")
    if not any((directory / name).is_file() for name in (STATE_FILE, "config.json")):
        raise ConfigError(
            f"--checkpoint {directory} is neither a step of a run, as RUN/checkpoints/step_N ({STATE_FILE} is missing) "
            "nor a Hugging Face or converted Megatron checkpoint, as RUN/hf (config.json is missing)"
        )


def _check_sampling(options: argparse.Namespace) -> None:
    from megatron_mmrl.config import ConfigError

    if options.samples < 1:
        raise ConfigError(f"--samples {options.samples}: must be at least 1")
    if options.temperature < 0:
        raise ConfigError(f"--temperature {options.temperature}: must be at least 0")
    if options.samples > 1 and options.temperature == 0:
        raise ConfigError(
            f"--samples {options.samples} needs --temperature above 0, such as 0.6: greedy answers are all the same"
        )
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p {options.top_p}: must lie above 0 and not above 1")
    if options.top_k != -1 and options.top_k < 1:
        raise ConfigError(f"--top-k {options.top_k}: must be at least 1, or -1 for all")
    for k in options.pass_k or ():
        if not 1 <= k <= options.samples:
            raise ConfigError(f"--pass-k {k} cannot be estimated from --samples {options.samples} answers")


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line of a rank: what was given here, in the same words."""
    words = ["--config", str(options.config), "--checkpoint", str(options.checkpoint)]
    many = [("--data", options.data), ("--pass-k", options.pass_k or []), ("--by", options.by)]
    words += [word for name, values in many for value in values for word in (name, str(value))]
    single = {
        "--samples": (options.samples, 1),
        "--temperature": (options.temperature, 0.0),
        "--top-p": (options.top_p, 1.0),
        "--top-k": (options.top_k, -1),
        "--correct": (options.correct, None),
        "--json": (options.json, None),
        "--output": (options.output, None),
    }
    words += [word for name, (value, default) in single.items() if value != default for word in (name, str(value))]
    words += ["--benchmark"] if options.benchmark else []
    return [*words, *options.overrides]
