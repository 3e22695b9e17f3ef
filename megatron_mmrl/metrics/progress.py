"""What a person sees while it runs: one live line on a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Field = tuple[str, str]  # key of the row, how it is shown

PLAIN_FIELDS: tuple[Field, ...] = (
    ("reward/mean", "reward {:.3f}"),
    ("reward/accuracy", "accuracy {:.3f}"),
    ("reward/format", "format {:.3f}"),
    ("eval/accuracy", "eval accuracy {:.3f}"),
    ("loss", "loss {:+.4f}"),
    ("grad_norm", "grad norm {:.3f}"),
    ("entropy", "entropy {:.3f}"),
    ("mismatch/max_abs", "mismatch {:.1e}"),
    ("response_tokens/mean", "{:.1f} tokens/response"),
    ("tokens_per_second", "{:.0f} tokens/s"),
    ("time/step_s", "{:.2f} s/step"),
)
LIVE_FIELDS: tuple[Field, ...] = (
    ("reward/mean", "reward {:.3f}"),
    ("eval/accuracy", "eval accuracy {:.3f}"),
    ("tokens_per_second", "{:.0f} tokens/s"),
)


def format_row(row: Mapping[str, float], fields: Sequence[Field] = PLAIN_FIELDS) -> str:
    """``reward 0.731 | eval accuracy 0.810 | ...``: the fields that the row has, in the order of ``fields``."""
    return " | ".join(text.format(row[key]) for key, text in fields if key in row)


def format_seconds(seconds: float) -> str:
    """``42s``, ``3m07s``, ``2h05m``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes_rest:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Progress:
    """Shows the rows of a run of ``num_steps`` steps as they come; ``what``: a step, or whatever else is counted."""

    def __init__(self, num_steps: int, stream: TextIO | None = None, *, what: str = "step") -> None:
        self._num_steps, self._stream, self._what = num_steps, stream or sys.stdout, what
        self._first: tuple[float, float] | None = None  # (seconds, step) of the first row shown
        self._latest: dict[str, float] = {}
        self._live = _live_line(num_steps, self._stream, what) if self._stream.isatty() else None

    def show(self, row: Mapping[str, float]) -> None:
        """Show one row; it must have ``step``."""
        step = row["step"]
        left = self._eta(step)
        eta = "" if left is None else f" | {format_seconds(left)} left"
        if self._live is None:
            width = len(str(self._num_steps))
            text = f"{self._what} {step:>{width}.0f}/{self._num_steps} | {format_row(row)}{eta}"
            print(text, file=self._stream, flush=True)
            return
        self._latest |= row  # an evaluation stays in view until the next one
        text = format_row(self._latest, LIVE_FIELDS) + eta
        self._live.update(self._live.task_ids[0], completed=step, description=text)

    def note(self, text: str) -> None:
        """Print a line (above the live one)."""
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        if self._live is not None:
            self._live.stop()

    def _eta(self, step: float) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        start, first = self._first
        return (now - start) / (step - first) * (self._num_steps - step) if step > first else None


def _live_line(num_steps: int, stream: TextIO, what: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn(what, markup=False),
        MofNCompleteColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.description}", markup=False),
    )
    live = RichProgress(*columns, console=Console(file=stream))
    live.add_task("starting", total=num_steps)
    live.start()
    return live
