"""``mmrl``: check everything, then start the ranks. Heavy packages are imported by the commands that need them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import megatron_mmrl

if TYPE_CHECKING:
    from megatron_mmrl.config import Config

QUICKSTART_CONFIG = Path(megatron_mmrl.__file__).parent.parent / "configs" / "quickstart.yaml"
PREPARED_DIR = Path("runs/prepared")

_DESCRIPTION = """\
Reinforcement learning with verifiable rewards for vision-language models,
on Megatron-core and SGLang.

  mmrl quickstart                         a tiny model learns to read digits
  mmrl train --config configs/quickstart.yaml optim.lr=1e-3
  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/hf
"""
_OVERRIDES = """\
key=value sets a configuration key and may be repeated; values are YAML:
  optim.lr=1e-3  run.num_steps=20  data.train_files=[a.parquet,b.parquet]
An unknown key, a wrong type or a layout that the model cannot be cut into
ends with exit code 2 before any process is started.
"""
_QUICKSTART = """\
Writes scanned digits and a tiny random Qwen2.5-VL to runs/prepared/ (once),
then trains as "mmrl train --config configs/quickstart.yaml" does: a short
supervised warm-up, then GRPO. Results are under runs/quickstart/. Typing the
same command again continues an interrupted run.

  mmrl quickstart
  mmrl quickstart run.seed=1 run.output_dir=runs/seed1
  mmrl quickstart parallel.tensor_model_parallel_size=1 parallel.pipeline_model_parallel_size=2
"""
_TRAIN = """\
Starts one process per rank on this machine, as many as the product of the
parallel sizes. On several machines, or under your own launcher:
  torchrun --nproc-per-node N -m megatron_mmrl.train --config F [key=value ...]

  mmrl train --config configs/quickstart.yaml run.output_dir=runs/first
  mmrl train --config configs/quickstart.yaml --dry-run rollout.num_engines=2
"""
_EVAL = """\
Answers the held-out prompts (data.eval_files) greedily and prints their
accuracy. A checkpoint is a step of a run or a Hugging Face directory.

  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/step_100
  mmrl eval --config configs/quickstart.yaml --checkpoint runs/quickstart/hf run.max_eval_prompts=100
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A parsed command line."""

    command: str  # quickstart | train | eval
    config: Path
    overrides: tuple[str, ...]
    checkpoint: Path | None = None
    dry_run: bool = False
    task: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 for a command line or configuration that cannot be used, 130 after Ctrl-C,
    143 after SIGTERM, 1 for a run that failed."""
    request = parse(sys.argv[1:] if argv is None else argv)
    from megatron_mmrl.config import ConfigError

    try:
        if request.command == "quickstart":
            return quickstart(request)
        return evaluate(request) if request.command == "eval" else train(request)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted (SIGINT)", file=sys.stderr)
        return 130


def parse(argv: Sequence[str]) -> Request:
    """Read a command line; ``key=value`` may stand anywhere. Exits with code 2 and a message if it cannot be read."""
    parser, commands = _parsers()
    options, rest = parser.parse_known_args(argv)
    for argument in rest:
        if argument.startswith("-") or "=" not in argument:
            hint = f"; write {argument.lstrip('-')}" if argument.startswith("--") and "." in argument else ""
            commands[options.command].error(f"unrecognized argument {argument}{hint}")
    values = vars(options)
    return Request(
        command=options.command,
        config=Path(values.get("config") or QUICKSTART_CONFIG),
        overrides=(*options.overrides, *rest),
        checkpoint=values.get("checkpoint"),
        dry_run=values.get("dry_run", False),
        task=values.get("task"),
    )


def train(request: Request) -> int:
    """Check the configuration, then run ``megatron_mmrl.train`` on all ranks."""
    from megatron_mmrl.checkpoint.output_dir import LOG_DIR, claim_output_dir
    from megatron_mmrl.cluster.preflight import preflight
    from megatron_mmrl.config import dump_config, load_config

    config = load_config(request.config, request.overrides)
    preflight(config)
    claim_output_dir(config)
    if request.dry_run:
        print(dump_config(config) + _describe_layout(config), end="")
        return 0
    return _run_ranks("megatron_mmrl.train", request, config, Path(config.run.output_dir) / LOG_DIR)


def evaluate(request: Request) -> int:
    """Check configuration and checkpoint, then run ``megatron_mmrl.evaluate`` on all ranks."""
    from megatron_mmrl.checkpoint.output_dir import LOG_DIR
    from megatron_mmrl.cluster.preflight import preflight
    from megatron_mmrl.config import ConfigError, load_config

    config = load_config(request.config, request.overrides)
    preflight(config, need="eval_files")
    if request.checkpoint is None or not request.checkpoint.is_dir():
        raise ConfigError(f"--checkpoint {request.checkpoint} is not a directory")
    return _run_ranks("megatron_mmrl.evaluate", request, config, Path(config.run.output_dir) / LOG_DIR / "eval")


def quickstart(request: Request) -> int:
    """Prepare data and model if they are missing, then train."""
    if not request.config.is_file():
        from megatron_mmrl.config import ConfigError

        raise ConfigError(f"{request.config} is missing; run quickstart from a clone of the repository")
    prepared = prepare_quickstart(request.task)
    overrides = ("run.resume=auto", *request.overrides)  # typing the same command again continues it
    if request.task is not None:
        overrides = (
            f"run.output_dir=runs/quickstart_{request.task}",
            f"model.path={prepared}/model",
            f"data.train_files=[{prepared}/train.parquet]",
            f"data.eval_files=[{prepared}/test.parquet]",
            *overrides,
        )
    return train(Request(command="train", config=request.config, overrides=overrides))


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


def _run_ranks(module: str, request: Request, config: Config, log_dir: Path) -> int:
    from megatron_mmrl.cluster.local import run_ranks

    args = ["--config", str(request.config), *request.overrides]
    if request.checkpoint is not None:
        args[2:2] = ["--checkpoint", str(request.checkpoint)]
    return run_ranks(module, args, config.parallel.world_size, log_dir)


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


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="mmrl", description=_DESCRIPTION, formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mmrl {megatron_mmrl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    made = {}
    for name, summary, text in (
        ("quickstart", "prepare a small task and train on it", _QUICKSTART),
        ("train", "train a model", _TRAIN),
        ("eval", "evaluate a checkpoint on the held-out prompts", _EVAL),
    ):
        made[name] = commands.add_parser(
            name, help=summary, description=text, epilog=_OVERRIDES, formatter_class=formatter, allow_abbrev=False
        )
        made[name].add_argument("overrides", nargs="*", metavar="key=value", help="set a configuration key")
    for name in ("train", "eval"):
        made[name].add_argument("--config", type=Path, required=True, metavar="F", help="YAML file")
    made["quickstart"].add_argument("--task", choices=("read", "add", "both"), help="what is asked of the digits")
    made["train"].add_argument("--dry-run", action="store_true", help="print the resolved configuration and layout")
    made["eval"].add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="D",
        help="checkpoints/step_N of a run, or a Hugging Face model",
    )
    return parser, made


if __name__ == "__main__":
    sys.exit(main())
