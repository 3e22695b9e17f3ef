"""MM-Eureka's jsonl -> train.parquet and test.parquet, with siiRL's options: ``mmrl data prepare`` by another name.

python examples/data_preprocess/mm_eureka.py --jsonl_file mm_eureka.jsonl --output_dir ~/data/mm_eureka
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mmrl.commands.data_prepare import guarded, image_root, prepare_and_report
from megatron_mmrl.data.prepare import PrepareOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jsonl_file", required=True, help="rows of either schema of MM-Eureka")
    parser.add_argument("--output_dir", type=Path, default=Path("~/data/mm_eureka"), help="must not exist, or be empty")
    parser.add_argument("--dataset_name", default="mm_eureka", help="data_source of the rows")
    parser.add_argument("--nproc", type=int, default=min(16, len(os.sched_getaffinity(0))), help="processes")
    parser.add_argument("--test_split", type=float, default=5.0, help="percent of the rows that are held out")
    parser.add_argument("--image_root", help="images are opened only below it (default: where the jsonl file is)")
    parser.add_argument("--template", default="siirl", help="texts baked into the prompts; none: as they are")
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared there before")
    options = parser.parse_args(arguments)
    return guarded(
        lambda: prepare_and_report(prepare_options(options), options.output_dir, overwrite=options.overwrite)
    )


def prepare_options(options: argparse.Namespace) -> PrepareOptions:
    """siiRL's options in our words."""
    return PrepareOptions(
        files=(str(Path(options.jsonl_file).expanduser()),),
        format="mm_eureka",
        image_root=image_root(options.image_root, [options.jsonl_file]),
        template=None if options.template == "none" else options.template,
        data_source=options.dataset_name,
        test_percent=options.test_split,
        jobs=options.nproc,
    )


if __name__ == "__main__":
    sys.exit(main())
