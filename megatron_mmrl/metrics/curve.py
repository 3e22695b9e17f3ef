"""The run's training curve as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.metrics.writer import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REWARD, ACCURACY = "reward/mean", "eval/accuracy"
_REWARD_COLOR, _ACCURACY_COLOR = "#8aa5c4", "#c2410c"


def plot_curve(metrics_jsonl: Path, png: Path) -> None:
    """Draw mean reward and held-out accuracy over the steps of ``metrics.jsonl``.

    Raises:
        ValueError: no row has either of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(metrics_jsonl)
    reward, accuracy = _series(rows, REWARD), _series(rows, ACCURACY)
    if not reward and not accuracy:
        raise ValueError(f"{metrics_jsonl} has no row with {REWARD} or {ACCURACY}; there is nothing to draw")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if reward:
        axes.plot(*zip(*reward, strict=True), color=_REWARD_COLOR, linewidth=1.5, label="Training: mean reward")
    if accuracy:
        _draw_accuracy(axes, accuracy)
    _dress(axes, [value for _, value in reward + accuracy], name=metrics_jsonl.parent.name)
    figure.savefig(png)


def _series(rows: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row and not math.isnan(row[key])]


def _draw_accuracy(axes: Axes, points: list[tuple[float, float]]) -> None:
    axes.plot(
        *zip(*points, strict=True),
        color=_ACCURACY_COLOR,
        marker="o",
        linewidth=2,
        label="Held-out questions: share answered right",
    )
    for step, value in dict([points[0], points[-1]]).items():  # the two that people ask for
        axes.annotate(
            f"{value:.2f}",
            (step, value),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_ACCURACY_COLOR,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _dress(axes: Axes, values: list[float], *, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(f"Learning curve of {name}" if name else "Learning curve", loc="left", fontweight="bold")
    axes.set_xlabel("Training step (0: before training)")
    axes.set_ylabel("Reward, share of right answers")
    if min(values) >= 0 and max(values) <= 1:
        axes.set_ylim(0, 1.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
