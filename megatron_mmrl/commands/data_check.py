"""``mmrl data check``: what data files hold and what is wrong with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.commands.data_prepare import expanded, image_root, num_jobs

if TYPE_CHECKING:
    from megatron_mmrl.config.data import DataConfig
    from megatron_mmrl.config.reward import RewardConfig
    from megatron_mmrl.data.check import CountTokens, Parsable, Report, Spread

SUMMARY = "count rows, images and tokens, and list every bad row"
EXPECTED = (ValueError, RuntimeError, OSError)
DESCRIPTION = """\
Reads every row and decodes every image of data files, as a run would, and
reports rows, images, sizes in pixels and tokens, prompt lengths; and each row
that is bad, too long, a duplicate, or has an answer that no reward can parse,
by name and with the reason. Exit code 1 if anything is wrong.

  mmrl data check data/train.parquet data/test.parquet
  mmrl data check raw.jsonl --format mm_eureka --model Qwen/Qwen2.5-VL-7B-Instruct --json
"""
_SPREADS = {
    "width_pixels": "image width, pixels",
    "height_pixels": "image height, pixels",
    "image_tokens": "tokens per image",
    "prompt_chars": "prompt, characters",
    "prompt_tokens": "prompt, tokens",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet, arrow, jsonl, json or csv")
    parser.add_argument(
        "--config", dest="settings", type=Path, metavar="F", help="take data, reward and model settings from it"
    )
    parser.add_argument("--format", metavar="F", help="how a row is read (default: as configured, verl)")
    parser.add_argument("--model", metavar="D", help="count tokens with its tokenizer and chat template")
    parser.add_argument("--template", metavar="T", help="as data.template")
    parser.add_argument(
        "--image-root",
        metavar="D",
        help="image files are opened only below it (default: as configured; without --config, where the first FILE is)",
    )
    parser.add_argument("--min-pixels", type=int, metavar="N", help="as data.min_pixels")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="as data.max_pixels")
    parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="as data.max_prompt_tokens")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="findings to print (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, all findings in it")


def run(options: argparse.Namespace) -> int:
    from megatron_mmrl.data.check import check
    from megatron_mmrl.metrics.row_bar import row_bar

    data, reward, model = _settings(options)
    with _parsing(reward) as parsable, row_bar() as progress:
        report = check(
            expanded(options.files),
            data,
            count_tokens=_counter(model, data),
            parsable=parsable,
            jobs=num_jobs(options.jobs),
            progress=progress,
        )
    print(json.dumps({**asdict(report), "counts": report.counts}) if options.json else _text(report, options.limit))
    return 1 if report.findings else 0


def _settings(options: argparse.Namespace) -> tuple[DataConfig, RewardConfig, str | None]:
    from megatron_mmrl.cluster.preflight import read_model_config
    from megatron_mmrl.config import load_config
    from megatron_mmrl.config.data import DataConfig
    from megatron_mmrl.config.reward import RewardConfig

    data, reward, model = DataConfig(), RewardConfig(), None
    if options.settings is not None:
        config = load_config(options.settings)
        data, reward, model = config.data, config.reward, config.model.path
        if options.model is None:
            read_model_config(model)  # transformers would look for a missing directory on the network
    keys = ("format", "template", "image_root", "min_pixels", "max_pixels", "max_prompt_tokens")
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    if options.settings is None:
        given["image_root"] = image_root(options.image_root, options.files)
    return replace(data, **given), reward, options.model or model


@contextmanager
def _parsing(reward: RewardConfig) -> Iterator[Parsable]:
    from megatron_mmrl.rewards.pool import RewardPool

    with RewardPool(reward) as pool:
        yield pool.check_prompts


def _counter(model: str | None, data: DataConfig) -> CountTokens | None:
    if model is None:
        return None
    from megatron_mmrl.data.processor import Processor

    return Processor(model, data).num_tokens


def _text(report: Report, limit: int) -> str:
    sources = ", ".join(f"{source} {count}" for source, count in sorted(report.sources.items()))
    lines = [f"rows {report.rows}, images {report.images}" + (f" ({sources})" if sources else "")]
    lines.append(f"{'':22}{'min':>10}{'mean':>10}{'median':>10}{'95 %':>10}{'max':>10}")
    lines += [_line(name, getattr(report, key)) for key, name in _SPREADS.items() if getattr(report, key) is not None]
    if not report.findings:
        return "\n".join([*lines, "nothing is wrong"])
    if report.counts.get("bad_row") == report.rows:
        lines.append("no row can be read; is --format right?")
    lines.append(", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items())))
    lines += [f"  {finding.id}: {finding.kind}: {finding.reason}" for finding in report.findings[:limit]]
    if (more := len(report.findings) - limit) > 0:
        lines.append(f"  and {more} more; --json lists all")
    return "\n".join(lines)


def _line(name: str, spread: Spread) -> str:
    numbers = (spread.min, spread.mean, spread.p50, spread.p95, spread.max)
    return f"{name:22}" + "".join(f"{number:>10.0f}" for number in numbers)
