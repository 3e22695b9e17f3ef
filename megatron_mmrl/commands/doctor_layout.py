"""``mmrl doctor layout``: what each rank would hold, and the proof that nothing is lost, on a machine without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_mmrl.config.model import ModelConfig
    from megatron_mmrl.config.parallel import ParallelConfig
    from megatron_mmrl.metrics.progress import Progress

SUMMARY = "what each rank of a layout would hold"
EXPECTED = (ValueError,)
DESCRIPTION = """\
Builds the shards of all ranks, or of those asked for, one after the other and
without memory, prints parameters and bytes per rank, and proves that together
they hold every tensor of the Hugging Face model exactly once. Needs no weights
and no GPU. A layout that the model cannot be cut into ends with exit code 2
and the nearest ones that work; shards that do not make up the model with 1.

  mmrl doctor layout --model qwen2_5_vl_72b --tensor 8 --pipeline 4 --data 8
  mmrl doctor layout --model runs/quickstart/hf --tensor 2 --ranks 0,1 --json layout.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="M", help="a file of configs/models, a YAML or JSON file, or a checkpoint"
    )
    for name in ("tensor", "pipeline", "context", "data"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{name}-parallel size (default 1)")
    parser.add_argument("--virtual-pipeline", type=int, metavar="N", help="model chunks per pipeline rank")
    parser.add_argument("--engine-tensor", type=int, default=1, metavar="N", help="check this size for SGLang too")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--freeze", default="", metavar="P,...", help="what is not trained, as in model.freeze")
    parser.add_argument("--ranks", default="all", metavar="N,...", help="which ranks to build (default: all)")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the report to this file")


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns 0, or 1 when the shards do not make up the model.

    Raises:
        ConfigError: no such model or rank, or a layout that the model cannot be cut into.
    """
    from megatron_mmrl.doctor.layout import inspect_layout
    from megatron_mmrl.doctor.layout_report import as_json, as_text
    from megatron_mmrl.models.known import config_dir

    with config_dir(options.model) as path:
        model, parallel = _sizes(options, path)
        _check(path, parallel, options.engine_tensor)
        with _progress() as on_built:
            report = inspect_layout(model, parallel, _ranks(options.ranks, parallel.world_size), on_built)
    print(as_text(report, options.model, model), end="")
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report, options.model, model), indent=2) + "\n")
    return 1 if report.coverage is not None and report.coverage.problems else 0


def _sizes(options: argparse.Namespace, path: Path) -> tuple[ModelConfig, ParallelConfig]:
    from megatron_mmrl.config import ConfigError
    from megatron_mmrl.config.model import ModelConfig
    from megatron_mmrl.config.parallel import ParallelConfig

    freeze = [part for part in options.freeze.split(",") if part]
    try:
        return ModelConfig(path=str(path), dtype=options.dtype, freeze=freeze), ParallelConfig(
            tensor_model_parallel_size=options.tensor,
            pipeline_model_parallel_size=options.pipeline,
            virtual_pipeline_model_parallel_size=options.virtual_pipeline,
            context_parallel_size=options.context,
            data_parallel_size=options.data,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check(path: Path, parallel: ParallelConfig, engine_tensor: int) -> None:
    """Refuse what the trainer would refuse, and say what is near."""
    from megatron_mmrl.config import ConfigError
    from megatron_mmrl.doctor.layout_nearest import check, describe, nearest_layouts
    from megatron_mmrl.models.registry import read_hf_config

    hf_config = read_hf_config(path)
    try:
        check(hf_config, parallel, engine_tensor)
    except ValueError as error:
        nearest = nearest_layouts(hf_config, parallel)
        if nearest[0] == parallel:  # it is the engine's size that does not fit
            raise ConfigError(str(error)) from error
        lines = "".join(f"\n  {describe(layout)}" for layout in nearest)
        raise ConfigError(f"{error}\nnearest layouts that work:{lines}") from error


def _ranks(text: str, world: int) -> list[int] | None:
    from megatron_mmrl.config import ConfigError

    if text == "all":
        return None
    if not all(rank.isdecimal() and int(rank) < world for rank in text.split(",")):
        raise ConfigError(f"--ranks {text}: give all, or numbers from 0 to {world - 1} separated by commas")
    return [int(rank) for rank in text.split(",")]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of kinds of rank on a terminal, nothing elsewhere."""
    with ExitStack() as stack:
        bars: list[Progress] = []

        def on_built(built: int, of: int) -> None:
            from megatron_mmrl.metrics.progress import Progress

            if not bars and sys.stderr.isatty():
                bars.append(Progress(of, sys.stderr))
                stack.callback(bars[0].close)
            for bar in bars:
                bar.show({"step": built})

        yield on_built
