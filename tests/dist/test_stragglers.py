"""Three gloo ranks, one of them slow in one phase: that one is named, in that phase and in no other."""

from __future__ import annotations

import time

from tests.dist.launch import run_ranks


def _steps() -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from megatron_mmrl.metrics.stragglers import WaitingClock, busy_seconds, straggler_row
    from megatron_mmrl.metrics.timers import Timers

    dist.init_process_group("gloo")
    timers, clock = Timers(), WaitingClock()
    for phase in ("bake", "eat", "wash"):
        with timers.time("day"), timers.time(phase):
            for _ in range(4):
                time.sleep(0.15)
                if dist.get_rank() == 1 and phase == "eat":
                    time.sleep(0.3)
                dist.all_reduce(torch.zeros(8))
    waiting = clock.flush()
    clock.close()
    ranks: list = [None] * 3
    dist.all_gather_object(ranks, busy_seconds(timers.seconds(), waiting))
    times = timers.flush()
    dist.destroy_process_group()
    return straggler_row(ranks) | times


def test_a_planted_delay_is_found() -> None:
    row = run_ranks(_steps, 3)[0]
    assert row["time/eat_s"] >= 1.8
    assert row["straggler/eat/rank"] == 1
    assert row["straggler/eat/busy_s"] > 1.7
    assert row["straggler/eat/ratio"] > 2
    assert row["straggler/day/rank"] == 1
    for phase in ("bake", "wash"):
        assert row[f"straggler/{phase}/ratio"] < 2
