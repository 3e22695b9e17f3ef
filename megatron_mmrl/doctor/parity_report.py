"""A parity report for people (a table and a verdict) and for programs (JSON)."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.table import Table

from megatron_mmrl.doctor.parity import ParityReport
from megatron_mmrl.doctor.parity_compare import Difference

_WIDTH = 120  # of a table that goes to a file


def print_report(report: ParityReport, stream: TextIO) -> None:
    """Differences per sample, whether each side sees, and as the last line the verdict or the first cause."""
    console = Console(file=stream, width=None if stream.isatty() else _WIDTH, highlight=False, soft_wrap=True)
    table = Table(title="token log-probs: largest (mean) difference in nats")
    for column in ("sample", "image", "tokens", *report.totals):
        table.add_column(column, no_wrap=True, justify="left" if column in ("sample", "image") else "right")
    for row in report.rows:
        table.add_row(row.sample, row.way, str(row.tokens), *map(_number, row.differences.values()))
    table.add_section()
    table.add_row("all", "", str(sum(row.tokens for row in report.rows)), *map(_number, report.totals.values()))
    console.print(table)
    for text in verdict(report):
        console.print(text, markup=False)


def verdict(report: ParityReport) -> list[str]:
    """What the table comes to, line by line."""
    lines = [f"skipped {reason}" for reason in report.skipped]
    for side in report.sides:
        seen = "no sample has an image" if side.sees is None else f"{'yes' if side.sees else 'no'}"
        moved = (
            ""
            if side.change is None
            else f" (blank images of the same size move a log-prob by up to {side.change:.2g})"
        )
        lines.append(f"{side.name} sees: {seen}{moved}")
    lines += [f"differs: {cause}" for cause in report.causes[1:]]
    if report.agree:
        return [*lines, f"parity: yes, within {report.allowed:.2g} nats"]
    return [*lines, f"parity: no; {report.causes[0]}"]


def as_json(report: ParityReport) -> dict[str, object]:
    """The whole report in plain values; what is not finite becomes null."""
    plain = _finite({**asdict(report), "agree": report.agree})
    assert isinstance(plain, dict)
    return plain


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(difference: Difference) -> str:
    return f"{difference.max:.1e} ({difference.mean:.1e})"
