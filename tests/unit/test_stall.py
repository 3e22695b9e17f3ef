"""Whose fault a stall is, and what is none, from what ranks say of themselves."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megatron_mmrl import pulse
from megatron_mmrl.cluster.stall import RankState, find_stall, numbers, store_lost, table

LIMIT_S, ANSWER_S = 60.0, 5.0
BASE = RankState(
    rank=0, host="a", pid=1, phase="update", step=7, entered=30, idle_s=0.0, waits=False, does="policy.py:9 (update)"
)


def state(rank: int, idle_s: float, *, waits: bool = False, silent_s: float = 0.0, entered: int = 30) -> RankState:
    return replace(BASE, rank=rank, host="ab"[rank % 2], idle_s=idle_s, waits=waits, silent_s=silent_s, entered=entered)


@pytest.mark.parametrize(
    "states",
    [
        [],
        [state(0, 10), state(1, 59)],
        [state(0, 500, waits=True), state(1, 1)],  # one works, the others wait as long as it takes
        [state(0, 500, waits=True), state(1, 500, waits=True), state(2, 0, waits=True)],
        [state(0, 3), state(1, 0, silent_s=500)],  # cut off from the store, but the run goes on
    ],
)
def test_this_is_no_stall(states: list[RankState]) -> None:
    assert find_stall(states, timeout_s=LIMIT_S, answers_within_s=ANSWER_S) is None


@pytest.mark.parametrize(
    ("states", "culprit", "words"),
    [
        ([state(0, 70), state(1, 0, waits=True)], 0, "no progress for 70 s in phase update of step 7 on a"),
        ([state(0, 70, waits=True), state(1, 61)], 1, "no progress for 61 s"),
        ([state(0, 70, waits=True), state(1, 5, silent_s=60), state(2, 80)], 1, "has not answered for 60 s"),
        ([state(0, 70, waits=True), state(1, 2, silent_s=60)], 1, "process 1"),
        ([state(0, 70, waits=True), state(1, 65, waits=True, entered=29)], 1, "every rank waits for another"),
        ([state(0, 70, waits=True), state(1, 65, waits=True)], 0, "least far"),
        ([state(rank, 60 + rank, silent_s=10) for rank in (1, 2)], 1, "(2 ranks do not)"),
    ],
)
def test_this_is_whose_fault(states: list[RankState], culprit: int, words: str) -> None:
    stall = find_stall(states, timeout_s=LIMIT_S, answers_within_s=ANSWER_S)
    assert stall is not None
    assert stall.culprit.rank == culprit
    assert words in stall.message


def test_without_the_store_a_rank_that_gets_on_stays_and_another_blames_who_served_it() -> None:
    server = state(0, 1, silent_s=62)
    assert store_lost(state(1, 59, waits=True), server, "h:1", timeout_s=LIMIT_S) is None
    served = store_lost(state(1, 61, waits=True), server, "h:1", timeout_s=LIMIT_S)
    assert served is not None
    assert served.culprit == server
    launched = store_lost(state(1, 61, waits=True), None, "h:1", timeout_s=LIMIT_S)
    assert launched is not None
    assert "the launcher's store at h:1 does not answer" in launched.message


def test_the_table_has_a_line_for_what_is_alike() -> None:
    states = [state(rank, 70, waits=True) for rank in range(64)]
    states[9] = state(9, 1, silent_s=100)
    lines = table(states, ANSWER_S).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("  rank 9 on b: does not answer; was in phase update, step 7, stuck for 101 s")
    assert lines[2].startswith("  ranks 0-8, 10-63 on a, b: waits for others, in phase update, step 7, stuck for 70 s")


def test_numbers_join_neighbours() -> None:
    assert numbers([5]) == "rank 5"
    assert numbers([2, 0, 1, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_a_pulse_knows_phase_step_and_rest() -> None:
    before = pulse.mark().entered
    pulse.at_step(3)
    with pulse.phase("bake"), pulse.phase("knead"):
        assert pulse.phases() == ("bake", "knead")
        now = pulse.mark()
        assert (now.phase, now.step, now.entered) == ("knead", 3, before + 2)
        time.sleep(0.05)
        assert pulse.mark().idle_s >= 0.05
        with pulse.limited_wait(100.0):
            pulse.forgive(-90.0)
            assert pulse.mark().idle_s == 0.0
            pulse.forgive(-20.0)
            assert pulse.mark().idle_s >= 10.0
            pulse.beat()
            assert pulse.mark().idle_s == 0.0
    assert pulse.phases() == ()
