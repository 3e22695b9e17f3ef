"""What people look at: plain lines, the live line, the curve."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import pytest

from megatron_mmrl.metrics.curve import plot_curve
from megatron_mmrl.metrics.progress import LIVE_FIELDS, Progress, format_row, format_seconds
from megatron_mmrl.metrics.writer import JsonlWriter

ROW = {
    "step": 12.0,
    "eval/accuracy": 0.8125,
    "reward/mean": 0.73149,
    "loss": -0.01234,
    "tokens_per_second": 841.7,
    "time/step_s": 1.314,
    "time/generate_s": 0.9,
    "mismatch/max_abs": 3.2e-6,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_row_as_text() -> None:
    assert format_row(ROW) == (
        "reward 0.731 | eval accuracy 0.812 | loss -0.0123 | mismatch 3.2e-06 | 842 tokens/s | 1.31 s/step"
    )
    assert format_row(ROW, LIVE_FIELDS) == "reward 0.731 | eval accuracy 0.812 | 842 tokens/s"
    assert format_row({"step": 1.0}) == ""
    assert format_row({"loss": math.nan}) == "loss +nan"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (42.4, "42s"), (59.7, "1m00s"), (187, "3m07s"), (3600, "1h00m"), (7530, "2h05m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_log_file_gets_one_plain_line_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(200, stream)
    progress.show({"step": 0.0, "eval/accuracy": 0.5})
    progress.note("a remark")
    progress.show({"step": 1.0, "reward/mean": 0.5})
    progress.show({"step": 3.0, "reward/mean": 0.6})
    progress.close()
    # 10 s for one step, 199 left; 30 s for three, 197 left
    assert stream.getvalue().splitlines() == [
        "step   0/200 | eval accuracy 0.500",
        "a remark",
        "step   1/200 | reward 0.500 | 33m10s left",
        "step   3/200 | reward 0.600 | 32m50s left",
    ]


def test_time_left_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(110, stream)
    progress.show({"step": 100.0})
    progress.show({"step": 102.0})  # 10 s for each step of this process, 8 left
    assert stream.getvalue().splitlines()[1].endswith("| 1m20s left")


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    progress = Progress(20, stream)
    progress.show({"step": 0.0, "eval/accuracy": 0.5})
    progress.show({"step": 7.0, "reward/mean": 0.625, "tokens_per_second": 99.0})
    progress.note("[a remark]")
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "7/20" in shown
    assert "reward 0.625 | eval accuracy 0.500 | 99 tokens/s" in shown  # the last evaluation stays in view
    assert "[a remark]" in shown


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(0, {"eval/accuracy": 0.4})
    for step in range(1, 11):
        row = {"reward/mean": step / 10 if step != 5 else math.nan}
        writer.write(step, row | ({"eval/accuracy": step / 10} if step == 10 else {}))
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert png_size(tmp_path / "curve.png") == (960, 540)


@pytest.mark.parametrize("row", [{"eval/accuracy": 0.4}, {"reward/mean": -3.0}])
def test_a_curve_of_one_point(tmp_path: Path, row: dict[str, float]) -> None:
    JsonlWriter(tmp_path / "metrics.jsonl").write(0, row)
    plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert png_size(tmp_path / "curve.png") == (960, 540)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    JsonlWriter(tmp_path / "metrics.jsonl").write(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
