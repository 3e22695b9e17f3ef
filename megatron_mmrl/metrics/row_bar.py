"""How far a pass over many rows is: a bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def row_bar(stream: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield ``advance(num_rows, total_rows)``; the bar is gone when the context ends."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield lambda num_rows, total_rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda num_rows, total_rows: bar.update(task, advance=num_rows, total=total_rows)
