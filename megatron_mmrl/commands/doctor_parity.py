"""``mmrl doctor parity``: do Hugging Face, Megatron and SGLang read a checkpoint alike, and if not, where not?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_mmrl.config.parallel import ParallelConfig

SUMMARY = "compare Hugging Face, Megatron and SGLang on real samples"
EXPECTED = (ValueError,)
DESCRIPTION = """\
Scores the gold answers of some rows of a data file with Hugging Face's model,
with Megatron in the given layout and with an SGLang server: as they are, with
blank images of the same size, and without images. Prints how far the token
log-probs are apart and whether each side sees its images. Ends with exit code
0 when all agree, else with 1 and, in the last line, the first layer or tensor
that differs.

  mmrl doctor parity --checkpoint runs/quickstart/hf --data runs/prepared/test.parquet
  mmrl doctor parity --checkpoint runs/quickstart/hf --data runs/prepared/test.parquet \\
      --layout tensor=2,pipeline=2 --skip-engine --json parity.json
"""
_SIZES = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual-pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "data": "data_parallel_size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="D", help="a Hugging Face model")
    parser.add_argument("--data", type=Path, required=True, metavar="F", help="parquet file of prompts")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="rows to compare (default 8)")
    parser.add_argument(
        "--layout", default="", metavar="NAME=N,...", help=f"Megatron's sizes: {', '.join(_SIZES)}; default 1 each"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X", help="nats of a token, relative of a layer (default 1e-4)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of Megatron and SGLang (default float32)"
    )
    parser.add_argument("--engine-tensor", type=int, default=1, metavar="N", help="SGLang's tensor-parallel size")
    parser.add_argument("--skip-engine", action="store_true", help="start no SGLang")
    parser.add_argument("--processor", type=Path, metavar="D", help="whose tokenizer and image processor training uses")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="scale images to at most so many pixels, all sides")
    parser.add_argument("--image-root", metavar="D", help="as data.image_root, where rows name image files")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the report to this file")


def run(options: argparse.Namespace) -> int:
    """Compare and print. Returns 0 when all agree, else 1.

    Raises:
        ConfigError: no such file, or a layout that the model cannot be cut into.
        ValueError: a side failed; says why.
    """
    parallel = parse_layout(options.layout)
    _check_arguments(options)
    _check_sizes(options, parallel)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from megatron_mmrl.doctor.parity import ParityOptions, run_parity
    from megatron_mmrl.doctor.parity_report import as_json, print_report
    from megatron_mmrl.rollout.engine import EngineError

    wanted = ParityOptions(
        checkpoint=options.checkpoint,
        data=options.data,
        samples=options.samples,
        parallel=parallel,
        tolerance=options.tolerance,
        dtype=options.dtype,
        engine_tensor=None if options.skip_engine else options.engine_tensor,
        processor=options.processor,
        max_pixels=options.max_pixels,
        image_root=options.image_root,
    )
    try:
        report = run_parity(wanted, note=lambda text: print(text, file=sys.stderr, flush=True))
    except EngineError as error:
        raise ValueError(str(error)) from error
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report), indent=2) + "\n")
    print_report(report, sys.stdout)
    return 0 if report.agree else 1


def parse_layout(text: str) -> ParallelConfig:
    """``tensor=2,pipeline=2`` as sizes. Raises ConfigError."""
    from megatron_mmrl.config import ConfigError
    from megatron_mmrl.config.parallel import ParallelConfig

    sizes: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in _SIZES or not size.isdecimal():
            raise ConfigError(f"--layout {text}: {part!r} is not NAME=N with a NAME of {', '.join(_SIZES)}")
        sizes[_SIZES[name]] = int(size)
    try:
        return ParallelConfig(**sizes)
    except ValueError as error:
        raise ConfigError(f"--layout {text}: {error}") from error


def _check_arguments(options: argparse.Namespace) -> None:
    from megatron_mmrl.config import ConfigError

    for name in ("checkpoint", "processor"):
        path = getattr(options, name)
        if path is not None and not (path / "config.json").is_file():
            raise ConfigError(f"--{name} {path} has no config.json; give a Hugging Face checkpoint")
    if not options.data.is_file():
        raise ConfigError(f"--data {options.data} does not exist")
    for name in ("samples", "engine_tensor"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if not options.tolerance > 0:
        raise ConfigError(f"--tolerance {options.tolerance}: must be above 0")


def _check_sizes(options: argparse.Namespace, parallel: ParallelConfig) -> None:
    """Refuse before anything is loaded what the trainer would refuse."""
    from megatron_mmrl.config import ConfigError
    from megatron_mmrl.doctor.layout_nearest import check
    from megatron_mmrl.models.registry import read_hf_config

    try:
        check(read_hf_config(options.checkpoint), parallel, options.engine_tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
