"""Busy seconds and the slowest rank, from numbers."""

from __future__ import annotations

from megatron_mmrl.metrics.stragglers import RESOLUTION_S, busy_seconds, straggler_row


def test_busy_is_what_is_left_of_a_phase() -> None:
    assert busy_seconds({"a": 3.0, "b": 1.0, "c": 0.2}, {"a": 2.5, "c": 0.25}) == {"a": 0.5, "b": 1.0, "c": 0.0}


def test_the_slowest_rank_of_each_phase_is_named() -> None:
    row = straggler_row([{"a": 1.0, "b": 4.0}, {"a": 3.0, "b": 2.0}, {"a": 1.5, "b": 4.0}])
    assert row == {
        "straggler/a/rank": 1, "straggler/a/busy_s": 3.0, "straggler/a/ratio": 2.0,
        "straggler/b/rank": 0, "straggler/b/busy_s": 4.0, "straggler/b/ratio": 1.0,
    }  # fmt: skip


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    assert straggler_row([{"a": 1.0}, {"a": 3.0}])["straggler/a/ratio"] == 3.0


def test_what_is_too_short_to_measure_has_no_straggler() -> None:
    row = straggler_row([{"a": 0.0}, {"a": RESOLUTION_S / 2}, {"a": 0.0}])
    assert row["straggler/a/ratio"] == 1.0


def test_a_single_rank_has_no_straggler() -> None:
    assert straggler_row([{"a": 1.0}]) == {}
