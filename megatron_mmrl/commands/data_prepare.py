"""``mmrl data prepare``: a data set as it is downloaded -> the parquet files that a run reads."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mmrl.data.prepare import PrepareOptions
    from megatron_mmrl.data.split import SplitBy

SUMMARY = "read a data set and write train.parquet and test.parquet"
EXPECTED = (ValueError, RuntimeError, OSError)
ONE_QUESTION_FOR_ALL = ("clevr_cogen", "polymath")
"""Formats that ask the same of every picture, or in the picture: questions would tie all rows together."""
DESCRIPTION = """\
Reads parquet, arrow, jsonl, json or csv in one of many formats, checks and embeds
every image, and writes train.parquet and test.parquet in the schema that
data.format=verl reads. Rows that share a question or an image are never split
between the two. The output appears whole or not at all. See docs/data.md.

  mmrl data prepare geometry3k/train.parquet --format geometry3k --output-dir data/geometry3k
  mmrl data prepare mm.jsonl --format mm_eureka --template siirl --output-dir data/mm_eureka
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet, arrow, jsonl, json or csv")
    parser.add_argument("--format", required=True, metavar="F", help="how a row is read; docs/data.md lists them")
    parser.add_argument("--output-dir", required=True, type=Path, metavar="D", help="must not exist, or be empty")
    parser.add_argument("--overwrite", action="store_true", help="replace what was prepared in D before")
    parser.add_argument(
        "--image-root", metavar="D", help="image files are opened only below it (default: where the first FILE is)"
    )
    parser.add_argument("--allow-http", action="store_true", help="fetch images that rows name by address")
    parser.add_argument("--template", metavar="T", help="texts to bake into the prompts: a name or a YAML file")
    parser.add_argument("--data-source", metavar="NAME", help="name of the data set, in place of the format's own")
    parser.add_argument("--test-split", type=float, default=5.0, metavar="P", help="percent held out (default: 5)")
    parser.add_argument(
        "--split-by",
        choices=("either", "image", "question"),
        help="what ties rows together (default: either; image for clevr_cogen and polymath, whose questions are alike)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of held-out rows (default: 0)")
    parser.add_argument("--max-samples", type=int, metavar="N", help="read the first N rows only")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, metavar="X", help="default: 0.01")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")


def run(options: argparse.Namespace) -> int:
    from megatron_mmrl.data.prepare import PrepareOptions

    split_by: SplitBy = options.split_by or ("image" if options.format in ONE_QUESTION_FOR_ALL else "either")
    return prepare_and_report(
        PrepareOptions(
            files=expanded(options.files),
            format=options.format,
            image_root=image_root(options.image_root, options.files),
            allow_http=options.allow_http,
            template=options.template,
            data_source=options.data_source,
            test_percent=options.test_split,
            split_by=split_by,
            seed=options.seed,
            max_samples=options.max_samples,
            max_bad_fraction=options.max_bad_fraction,
            jobs=num_jobs(options.jobs),
        ),
        options.output_dir,
        overwrite=options.overwrite,
    )


def prepare_and_report(options: PrepareOptions, target: Path, *, overwrite: bool) -> int:
    """Prepare, with a bar on a terminal, and say what was written."""
    from megatron_mmrl.data.prepare import prepare
    from megatron_mmrl.metrics.row_bar import row_bar

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    target = target.expanduser()
    with row_bar() as progress:
        done = prepare(options, target, overwrite=overwrite, progress=progress)
    bad = f", {done.bad_rows} bad rows left out (bad_rows.jsonl)" if done.bad_rows else ""
    print(f"{target}: {done.train_rows} train and {done.test_rows} test rows, {done.images} images{bad}")
    return 0


def tool(description: str, arguments: Sequence[str] | None = None) -> int:
    """Main function of a script that does the same. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    return guarded(lambda: run(parser.parse_args(arguments)))


def guarded(main: Callable[[], int]) -> int:
    """The exit status of ``main()``; what goes wrong with the user's data is one line."""
    try:
        return main()
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted (SIGINT)", file=sys.stderr)
        return 130


def num_jobs(given: int | None) -> int:
    """Processes: as many as given, else one per core."""
    return len(os.sched_getaffinity(0)) if given is None else given


def expanded(files: Sequence[str]) -> tuple[str, ...]:
    """``~`` as the home directory."""
    return tuple(str(Path(file).expanduser()) for file in files)


def image_root(given: str | None, files: Sequence[str]) -> str:
    """The directory that images are confined to: as given, else that of the first file."""
    return str(Path(given).expanduser() if given is not None else Path(files[0]).expanduser().absolute().parent)
