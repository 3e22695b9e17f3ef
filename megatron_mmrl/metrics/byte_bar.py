"""How far a long copy is: a bar on a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def byte_bar(total_bytes: int, stream: TextIO | None = None) -> Iterator[Callable[[str, int], None]]:
    """Yield ``advance(what, num_bytes)``; the bar is gone when the context ends."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield lambda what, num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=total_bytes)

        def advance(what: str, num_bytes: int) -> None:
            bar.update(task, advance=num_bytes, description=what)

        yield advance
