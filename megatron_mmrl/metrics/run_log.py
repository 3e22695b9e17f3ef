"""The run's log as the loop sees it: timed phases, a row per step, completions, a curve at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from megatron_mmrl.config.run import RunConfig
from megatron_mmrl.metrics.curve import plot_curve
from megatron_mmrl.metrics.progress import Progress
from megatron_mmrl.metrics.stragglers import WaitingClock, busy_seconds, straggler_row
from megatron_mmrl.metrics.timers import Timers
from megatron_mmrl.metrics.writer import JsonlWriter, MetricsWriter, read_rows
from megatron_mmrl.types import Group


class Exchange(Protocol):
    """The collective that the log needs."""

    rank: int

    def all_gather(self, value: dict[str, float]) -> list[dict[str, float]]:
        """The values of all ranks, in rank order."""
        ...


class RunLog:
    """Every rank times its phases; rank 0 alone writes. ``write`` and ``supervised`` are collective."""

    def __init__(self, run: RunConfig, *, num_steps: int, first_step: int, exchange: Exchange) -> None:
        self._dir, self._run, self._writes = Path(run.output_dir), run, exchange.rank == 0
        self._timers, self._clock, self._exchange = Timers(), WaitingClock(), exchange
        if self._writes:
            self._metrics = MetricsWriter(
                self._dir, tensorboard=run.tensorboard, wandb_project=run.wandb_project, first_step=first_step
            )
            self._progress = Progress(num_steps)
            self._supervised: JsonlWriter | None = None

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the seconds of this block to ``time/<phase>_s`` of the next row."""
        with self._timers.time(phase):
            yield

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Write one row with the times since the last one, and who was slow."""
        times = self._times()
        if not self._writes:
            return
        full = {"step": float(step), **row, **times}
        if "tokens" in row and times.get("time/step_s"):
            full["tokens_per_second"] = row["tokens"] / times["time/step_s"]
        self._metrics.write(step, full)
        self._progress.show(full)

    def supervised(self, step: int, row: Mapping[str, float]) -> None:
        """Write one row of the supervised warm-up to a file of its own."""
        times = self._times()
        if not self._writes:
            return
        if self._supervised is None:
            self._supervised = JsonlWriter(self._dir / "supervised.jsonl", first_step=0)
        self._supervised.write(step, {"step": float(step), **row, **times})
        self._progress.note(f"supervised step {step}: loss {row['loss']:.3f}")

    def completions(self, step: int, groups: Sequence[Group]) -> None:
        """Write ``completions/step_N.jsonl``: one line per response."""
        if not self._writes or not self._run.log_completions:
            return
        path = self._dir / "completions" / f"step_{step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for group in groups:
                _write_group(file, group)

    def note(self, text: str) -> None:
        """Say something to whoever watches."""
        if self._writes:
            self._progress.note(text)

    def close(self) -> None:
        """Finish the files, draw ``curve.png`` and say what came of the run."""
        self._clock.close()
        if not self._writes:
            return
        self._progress.close()
        self._metrics.close()
        path = self._dir / "metrics.jsonl"
        if path.stat().st_size:
            plot_curve(path, self._dir / "curve.png")
        print(_summary(read_rows(path), self._dir), flush=True)

    def _times(self) -> dict[str, float]:
        busy = busy_seconds(self._timers.seconds(), self._clock.flush())
        return straggler_row(self._exchange.all_gather(busy)) | self._timers.flush()


def _summary(rows: Sequence[Mapping[str, float]], directory: Path) -> str:
    scores = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    result = f"held-out accuracy {scores[0]:.3f} -> {scores[-1]:.3f}; " if scores else ""
    return f"{result}everything is in {directory}/ (curve.png, metrics.jsonl, completions/, checkpoints/)"


def _write_group(file: IO[str], group: Group) -> None:
    for index, (response, score) in enumerate(zip(group.responses, group.scores or (), strict=True)):
        record = {
            "prompt_id": group.prompt.prompt.id,
            "sample": index,
            "text": response.text,
            "answer": group.prompt.prompt.answer,
            "reward": score.total,
            "terms": {**score.terms, **score.extras},
            "error": score.error,
            "length": len(response.ids),
            "finish": response.finish,
        }
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
