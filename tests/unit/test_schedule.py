"""Learning-rate schedules, by hand."""

from __future__ import annotations

import math

import pytest

from megatron_mmrl.config.optim import OptimConfig
from megatron_mmrl.trainer.schedule import lr_at


def rates(optim: OptimConfig, total: int, upto: int | None = None) -> list[float]:
    return [lr_at(update, optim, total) for update in range(upto or total)]


def test_warm_up_climbs_in_equal_parts_and_then_stays():
    optim = OptimConfig(lr=4.0, warmup_updates=3)
    assert rates(optim, 6) == [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]


def test_linear_reaches_the_minimum_at_the_last_update():
    optim = OptimConfig(lr=8.0, min_lr=2.0, schedule="linear")
    assert rates(optim, 4) == [8.0, 6.0, 4.0, 2.0]
    assert rates(optim, 4, upto=6)[4:] == [2.0, 2.0]  # beyond the end


def test_linear_after_warm_up():
    optim = OptimConfig(lr=3.0, schedule="linear", warmup_updates=2)
    assert rates(optim, 6) == pytest.approx([1.0, 2.0, 3.0, 2.0, 1.0, 0.0])


def test_cosine_by_hand():
    optim = OptimConfig(lr=3.0, min_lr=1.0, schedule="cosine")
    assert rates(optim, 5) == pytest.approx([3.0, 2 + math.sqrt(0.5), 2.0, 2 - math.sqrt(0.5), 1.0])


def test_constant_ignores_length_and_minimum():
    assert rates(OptimConfig(lr=5.0, min_lr=1.0), total=1, upto=3) == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_runs_shorter_than_the_warm_up_still_learn(schedule: str, total: int):
    optim = OptimConfig(lr=4.0, schedule=schedule, warmup_updates=3)
    assert rates(optim, total) == [1.0, 2.0, 3.0][:total]


def test_a_single_update_has_the_full_rate():
    assert rates(OptimConfig(lr=4.0, schedule="cosine"), 1) == [4.0]


def test_negative_update_is_refused():
    with pytest.raises(ValueError, match="update=-1"):
        lr_at(-1, OptimConfig(), 10)


def test_warm_up_as_a_share_of_all_updates():
    """10 % of 25 updates is 2.5, rounded up to 3."""
    share, count = (
        OptimConfig(lr=3.0, schedule="cosine", warmup_fraction=0.1),
        OptimConfig(lr=3.0, schedule="cosine", warmup_updates=3),
    )
    assert rates(share, 25) == rates(count, 25)
    assert rates(OptimConfig(lr=3.0, warmup_fraction=0.0), 4) == [3.0] * 4
    assert rates(OptimConfig(lr=4.0, warmup_fraction=1.0), 3) == [1.0, 2.0, 3.0]


def test_only_one_length_of_the_warm_up():
    with pytest.raises(ValueError, match=r"warmup_updates=5 and warmup_fraction=0\.1"):
        OptimConfig(warmup_updates=5, warmup_fraction=0.1)
    with pytest.raises(ValueError, match=r"warmup_fraction=1\.5"):
        OptimConfig(warmup_fraction=1.5)
