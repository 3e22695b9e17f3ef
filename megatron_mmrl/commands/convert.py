"""``mmrl convert``: Hugging Face checkpoints to Megatron distributed checkpoints and back."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mmrl.checkpoint.convert.hf_to_megatron import Result

SUMMARY = "convert between Hugging Face and Megatron checkpoints"
DESCRIPTION = """\
Converts safetensors to a Megatron distributed checkpoint (torch_dist), which
loads in any layout, and back, one tensor in memory at a time. Configuration,
tokenizer, processor and chat template travel along. The output must not exist;
after any failure nothing of it is left.

  mmrl convert hf-to-megatron Qwen2.5-VL-7B-Instruct qwen-megatron --verify
  mmrl convert megatron-to-hf qwen-megatron qwen-hf --scheme transformers
"""
_TO_MEGATRON = """\
Writes DST so that Megatron-LM takes it as --load and "mmrl train" as
model.path.

  mmrl convert hf-to-megatron Qwen2.5-VL-7B-Instruct qwen-megatron --verify
"""
_TO_HF = """\
SRC is what hf-to-megatron wrote, a directory of Megatron-LM, or one checkpoint
of it, saved in any layout.

  mmrl convert megatron-to-hf qwen-megatron qwen-hf
  mmrl convert megatron-to-hf run/iter_0000100 qwen-hf --files-from Qwen2.5-VL-7B-Instruct
"""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", required=True, metavar="direction")
    for name, summary, text, add in (
        ("hf-to-megatron", "safetensors to a Megatron distributed checkpoint", _TO_MEGATRON, add_to_megatron),
        ("megatron-to-hf", "a Megatron distributed checkpoint to safetensors", _TO_HF, add_to_hf),
    ):
        add(
            directions.add_parser(
                name,
                help=summary,
                description=text,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )


def add_to_megatron(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hf-to-megatron``."""
    _add_common(parser, "Hugging Face checkpoint, in either naming scheme")
    parser.set_defaults(run_direction=run_to_megatron)


def add_to_hf(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``megatron-to-hf``."""
    _add_common(parser, "Megatron checkpoint")
    parser.add_argument(
        "--scheme",
        choices=("original", "transformers"),
        help="tensor names: visual.* and model.*, or model.visual.* and model.language_model.*; default: as in the "
        "checkpoint that SRC was made from, else original",
    )
    parser.add_argument("--max-file-size", type=_size, default="5GB", metavar="N", help="of one file (default: 5GB)")
    parser.add_argument(
        "--files-from",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory with the configuration and tokenizer, if SRC has none",
    )
    parser.set_defaults(run_direction=run_to_hf)


def _add_common(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help=source)
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make; must not exist")
    parser.add_argument("--verify", action="store_true", help="read both sides back and print the largest difference")


def run(options: argparse.Namespace) -> int:
    return int(options.run_direction(options))


def run_to_megatron(options: argparse.Namespace) -> int:
    """Convert and say what was done."""
    from megatron_mmrl.checkpoint.convert.hf_to_megatron import hf_to_megatron
    from megatron_mmrl.metrics.byte_bar import byte_bar

    with byte_bar(_total_bytes(options)) as progress:
        result = hf_to_megatron(options.source, options.target, verify=options.verify, progress=progress)
    _report(result, options.target)
    return 0


def run_to_hf(options: argparse.Namespace) -> int:
    """Convert and say what was done."""
    from megatron_mmrl.checkpoint.convert.megatron_to_hf import megatron_to_hf
    from megatron_mmrl.metrics.byte_bar import byte_bar

    with byte_bar(_total_bytes(options)) as progress:
        result = megatron_to_hf(
            options.source,
            options.target,
            scheme=options.scheme,
            max_file_bytes=options.max_file_size,
            files_from=options.files_from,
            verify=options.verify,
            progress=progress,
        )
    _report(result, options.target)
    return 0


def tool(direction: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Main function of a script for one direction. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    {"hf-to-megatron": add_to_megatron, "megatron-to-hf": add_to_hf}[direction](parser)
    try:
        return run(parser.parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _total_bytes(options: argparse.Namespace) -> int:
    """Of what will flow: the weights, and once more to verify them."""
    files = [file for suffix in ("*.safetensors", "*.distcp") for file in options.source.rglob(suffix)]
    return sum(file.stat().st_size for file in files) * (2 if options.verify else 1)


def _report(result: Result, target: Path) -> None:
    print(f"{target}: {result.num_tensors} tensors, {result.num_bytes:,} bytes in {result.seconds:.1f} s")
    if result.comparison is not None:
        found = result.comparison
        print(
            f"verified: {found.num_tensors} tensors read back, equal in every bit; largest difference "
            f"{found.largest_difference:g}"
        )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB, 500MB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
