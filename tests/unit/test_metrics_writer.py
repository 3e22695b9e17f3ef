"""Rows on disk: what is written, what a resumed run keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl.metrics.timers import Timers
from megatron_mmrl.metrics.writer import JsonlWriter, MetricsWriter, read_rows


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensorboard_points(log_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def test_a_row_is_one_json_object_with_the_step_first(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new", tensorboard=False)
    writer.write(0, {"eval/accuracy": 0.25})
    writer.write(1, {"step": 1.0, "loss": np.float32(0.5), "reward/mean": np.float64(0.125), "tokens": 12})
    text = (tmp_path / "new" / "metrics.jsonl").read_text()  # not closed yet: every row is on disk at once
    assert text == (
        '{"step": 0, "eval/accuracy": 0.25}\n{"step": 1, "loss": 0.5, "reward/mean": 0.125, "tokens": 12}\n'
    )
    writer.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "kl": np.float32("nan"), "lr": 0.1})
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "loss": None, "grad_norm": None, "kl": None, "lr": 0.1}
    (read,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(read["loss"])
    assert read["lr"] == 0.1


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    for step in range(6):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a row
    resumed = MetricsWriter(tmp_path, first_step=4)  # from the checkpoint of step 3
    for step in (4, 5, 6):
        resumed.write(step, {"loss": -float(step)})
    resumed.close()
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0), (5, -5.0), (6, -6.0)]
    assert [(row["step"], row["loss"]) for row in lines(tmp_path / "metrics.jsonl")] == expected
    assert tensorboard_points(tmp_path / "tensorboard", "loss") == expected


def test_resuming_keeps_what_was_not_finite(tmp_path: Path) -> None:
    JsonlWriter(tmp_path / "m.jsonl").write(0, {"loss": math.nan})
    JsonlWriter(tmp_path / "m.jsonl", first_step=1)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0, "loss": null}\n'


def test_a_new_run_keeps_no_row(tmp_path: Path) -> None:
    JsonlWriter(tmp_path / "m.jsonl").write(0, {"loss": 1.0})
    JsonlWriter(tmp_path / "m.jsonl").write(0, {"loss": 2.0})
    assert lines(tmp_path / "m.jsonl") == [{"step": 0, "loss": 2.0}]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}', '{"step": 1.5}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2 "):
        JsonlWriter(path, first_step=3)
    assert path.read_text().count("\n") == 3  # nothing was lost


def test_tensorboard_gets_every_number_and_can_be_left_out(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "with")
    writer.write(3, {"step": 3.0, "loss": 0.5, "kl": math.nan})
    writer.close()
    assert tensorboard_points(tmp_path / "with" / "tensorboard", "loss") == [(3, 0.5)]
    ((step, value),) = tensorboard_points(tmp_path / "with" / "tensorboard", "kl")
    assert step == 3
    assert math.isnan(value)
    MetricsWriter(tmp_path / "without", tensorboard=False).close()
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb_project=demo.*pip install wandb"):
        MetricsWriter(tmp_path, wandb_project="demo")


def test_wandb_gets_rows_under_one_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself is a network service; what stands in for it only notes what it is given."""
    starts, rows, finished = [], [], []

    def init(**kwargs: str) -> types.SimpleNamespace:
        starts.append(kwargs)
        return types.SimpleNamespace(
            log=lambda row, step: rows.append((step, row)), finish=lambda: finished.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for first_step in (0, 1, 0):
        writer = MetricsWriter(tmp_path / "run", tensorboard=False, wandb_project="demo", first_step=first_step)
        writer.write(first_step, {"loss": 1.0})
        writer.close()
    assert [(start["project"], start["name"]) for start in starts] == [("demo", "run")] * 3
    assert starts[0]["id"] == starts[1]["id"] != starts[2]["id"]
    assert rows == [(0, {"loss": 1.0}), (1, {"loss": 1.0}), (0, {"loss": 1.0})]
    assert len(finished) == 3


def test_metrics_load_nothing_heavy() -> None:
    code = (
        "import sys; import megatron_mmrl.metrics.writer, megatron_mmrl.metrics.progress, megatron_mmrl.metrics.curve; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'tensorboard', 'matplotlib', 'rich')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_timers_add_up_until_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 10.0, 20.0, 20.5, 30.0, 31.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timers = Timers()
    with timers.time("step"), timers.time("generate"):  # 0 .. 10, 1 .. 3
        pass
    with pytest.raises(KeyError), timers.time("generate"):  # 20 .. 20.5
        raise KeyError
    assert timers.flush() == {"time/generate_s": 2.5, "time/step_s": 10.0}
    assert timers.flush() == {}
    with timers.time("generate"):
        pass
    assert timers.flush() == {"time/generate_s": 1.0}
