"""Rows of numbers, one per step: JSON lines always, TensorBoard and Weights & Biases where asked for.

``metrics.jsonl`` has one JSON object per line, ``step`` first. JSON has no NaN and no infinity: both are written as
``null`` (TensorBoard gets them as they are).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Sink(Protocol):
    """One place that rows go to."""

    def write(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes each row everywhere.

    ``first_step`` is the first step that this process will write. On resume a file may hold rows past the checkpoint:
    those of ``first_step`` and later will be written again and are removed. 0 is a new run: no row is kept.

    Raises:
        ValueError: ``wandb_project`` is given and wandb is not installed, or an existing file is not JSON lines.
    """

    def __init__(
        self, output_dir: Path, *, tensorboard: bool = True, wandb_project: str | None = None, first_step: int = 0
    ) -> None:
        self._sinks: list[Sink] = []
        if wandb_project is not None:
            self._sinks.append(WandbSink(output_dir, wandb_project, first_step=first_step))
        self._sinks.append(JsonlWriter(output_dir / "metrics.jsonl", first_step=first_step))
        if tensorboard:
            self._sinks.append(TensorBoardSink(output_dir / "tensorboard", first_step=first_step))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Write one row; it is on its way to the disk when this returns."""
        for sink in self._sinks:
            sink.write(step, row)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonlWriter:
    """Appends rows to one file, each whole and at once; holds no open file in between."""

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(path) if row["step"] < first_step] if path.exists() and first_step else []
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        os.replace(draft, path)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **{name: value for name, value in row.items() if name != "step"}}))

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardSink:
    """Scalars for TensorBoard, without TensorFlow and without torch."""

    def __init__(self, log_dir: Path, *, first_step: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(log_dir))
        if first_step:  # what an interrupted run wrote of later steps is not shown
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=first_step, session_log=start))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=self._summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id is kept in ``wandb_id``, so that a resumed run goes on in the same one."""

    def __init__(self, output_dir: Path, project: str, *, first_step: int = 0) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ValueError(
                f"run.wandb_project={project} needs the package wandb, which is not installed; "
                "run `pip install wandb` or leave run.wandb_project unset"
            ) from error
        id_file = output_dir / "wandb_id"
        if not first_step or not id_file.exists():
            output_dir.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        self._run = wandb.init(
            project=project, name=output_dir.name, dir=str(output_dir), id=id_file.read_text(), resume="allow"
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


def read_rows(path: Path) -> list[dict[str, float]]:
    """All rows of a file of JSON lines, null read as NaN; an unfinished last line (a killed writer's) is left out.

    Raises:
        ValueError: another line is not a JSON object with a ``step``; names file and line.
    """
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parsed(line: str, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{where} is not a row of metrics: an object with an integer step is needed")
    return {name: math.nan if value is None else value for name, value in row.items()}


def _line(row: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, default=float) + "\n"  # default: numpy's float32
