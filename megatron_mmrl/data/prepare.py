"""Data files of any format -> ``train.parquet`` and ``test.parquet`` in one schema, images embedded and checked.

First, processes read spans of rows, decode every picture and write parts; then, once it is known which rows belong
together, the parts are split in two files. Memory holds a row group or two per process and some 16 bytes per row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.fetch import FetchLimits
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.parquet import file_names
from megatron_mmrl.data.parts import Part, PartJob, write_part, write_splits
from megatron_mmrl.data.quarantine import Quarantine
from megatron_mmrl.data.raw import Span, plan_spans
from megatron_mmrl.data.split import SPLIT_BY, RowKeys, SplitBy, choose_test, components
from megatron_mmrl.data.template import load_template
from megatron_mmrl.data.whole import whole_directory
from megatron_mmrl.data.workers import ordered_map

FILES = ("train.parquet", "test.parquet", "bad_rows.jsonl", "prepared.json")
Progress = Callable[[int, int], None]
"""(rows read since the last call, rows in all)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What to read, what to keep and how to split."""

    files: tuple[str, ...]
    """Parquet, arrow, jsonl, json or csv files."""
    format: str
    """How a row is read; a key of FORMATS."""
    image_root: str | None = None
    """Only below this directory are image files opened; unset: rows must carry image bytes."""
    allow_http: bool = False
    fetch_limits: FetchLimits = field(default_factory=FetchLimits)
    template: str | None = None
    """Baked into the prompts: a name of data/templates or a YAML file."""
    data_source: str | None = None
    """Takes the place of the format's name of the data set."""
    test_percent: float = 5.0
    """Share of the rows that are held out, in percent."""
    split_by: SplitBy = "either"
    seed: int = 0
    """Of the choice of rows that are held out."""
    max_samples: int | None = None
    """Only the first so many rows are read."""
    max_bad_fraction: float = 0.01
    max_decoded_pixels: int = DataConfig().max_decoded_pixels
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.split_by not in SPLIT_BY:
            raise ValueError(f"split by {self.split_by!r}: use one of {', '.join(SPLIT_BY)}")
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not known; use one of {', '.join(FORMATS)}")
        if not 0 <= self.test_percent < 100:
            raise ValueError(f"test share of {self.test_percent} percent: must be at least 0 and below 100")
        if not self.files:
            raise ValueError("no data files given")
        for name, value in (("jobs", self.jobs), ("max samples", self.max_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max bad fraction={self.max_bad_fraction}: must be from 0 to 1")
        if self.template is not None:
            load_template(self.template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What was written."""

    train_rows: int
    test_rows: int
    bad_rows: int
    images: int


def prepare(
    options: PrepareOptions, target: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Prepared:
    """Write ``target``: ``train.parquet``, ``test.parquet`` (unless nothing is held out), ``prepared.json`` and, where
    there are any, ``bad_rows.jsonl``. The same input and options give the same bytes, whatever ``jobs`` is.

    Args:
        options: input, format, split.
        target: a directory that must not exist, or be empty.
        overwrite: replace a ``target`` that holds nothing but ``FILES``.
        progress: called as the rows are read.

    Raises:
        ValueError: files that cannot be read, no good row, rows that cannot be split, a ``target`` that is in use.
        TooManyBadRowsError: more bad rows than ``max_bad_fraction`` allows.
    """
    with whole_directory(target.expanduser(), replaces=FILES, overwrite=overwrite) as staged:
        spans = first_rows(plan_spans(options.files, options.jobs), options.max_samples)
        total = sum(span.num_rows for span in spans)
        quarantine = Quarantine(staged / "bad_rows.jsonl", max_bad_fraction=options.max_bad_fraction, total_rows=total)
        parts = _convert(spans, options, staged, quarantine, progress)
        keys = RowKeys.join([part.keys for part in parts])
        if not len(keys.questions):
            raise ValueError(f"none of the {total} rows can be used" if total else "the data files have no rows")
        is_test = choose_test(keys, components(keys, options.split_by), options.test_percent, options.seed)
        write_splits([part.path for part in parts], is_test, staged)
        test_rows = int(is_test.sum())
        prepared = Prepared(
            train_rows=len(is_test) - test_rows,
            test_rows=test_rows,
            bad_rows=quarantine.count,
            images=len(keys.images),
        )
        _describe(options, prepared, staged / "prepared.json")
    return prepared


def first_rows(spans: Sequence[Span], limit: int | None) -> list[Span]:
    """The spans of the first ``limit`` rows; None: of all."""
    kept: list[Span] = []
    left = sum(span.num_rows for span in spans) if limit is None else limit
    for span in spans:
        if left > 0:
            kept.append(replace(span, num_rows=min(span.num_rows, left)))
            left -= kept[-1].num_rows
    return kept


def _convert(
    spans: Sequence[Span], options: PrepareOptions, staged: Path, quarantine: Quarantine, progress: Progress | None
) -> list[Part]:
    job = PartJob(
        format=options.format,
        image_root=options.image_root,
        fetch_limits=options.fetch_limits if options.allow_http else None,
        template=options.template,
        data_source=options.data_source,
        max_decoded_pixels=options.max_decoded_pixels,
        folder=staged,
    )
    parts = []
    with closing(ordered_map(partial(write_part, job), enumerate(spans), options.jobs)) as results:
        for span, part in zip(spans, results, strict=True):
            for row, reason in part.bad:
                quarantine.add(span.name, row, reason)
            quarantine.check()
            parts.append(part)
            if progress is not None:
                progress(span.num_rows, sum(span.num_rows for span in spans))
    return parts


def _describe(options: PrepareOptions, prepared: Prepared, file: Path) -> None:
    """What was made of what, without times, and without paths unless names are equal: equal for equal input."""
    names = file_names(options.files)
    said = {
        "files": {name: Path(file).stat().st_size for name, file in zip(names, options.files, strict=True)},
        "format": options.format,
        "template": options.template,
        "data_source": options.data_source,
        "test_percent": options.test_percent,
        "split_by": options.split_by,
        "seed": options.seed,
        "max_samples": options.max_samples,
    }
    file.write_text(json.dumps({**said, **asdict(prepared)}, indent=2) + "\n", encoding="utf-8")
