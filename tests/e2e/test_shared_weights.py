"""Whole runs whose engine reads the trainer's memory: what it reads is watched, and it may die and come back."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from tests.e2e.run import Run
from tests.e2e.test_ending import descendants, kill_engine, start

TAKES = ("time/reshard_s", "time/verify_s", "reshard/alias_bytes", "reshard/copy_bytes", "reshard/pull_bytes",
         "reshard/receive_bytes")  # fmt: skip


def test_a_run_says_what_hand_overs_take(golden_run: Run) -> None:
    for row in golden_run.rows[1:]:
        assert all(row[name] > 0 for name in TAKES[:-1])
        assert row["reshard/receive_bytes"] == 0  # all ranks are on one node
        assert row["time/sync_s"] >= row["time/reshard_s"] + row["time/verify_s"]
        assert row["rollout/engine_restarts"] == 0


def test_a_dead_engine_comes_back_and_the_run_goes_on_as_if_nothing_had_happened(
    work_dir: Path, golden_run: Run
) -> None:
    process = start(work_dir, "revived", "run.num_steps=5", "run.export_hf=false")
    kill_engine(process)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    run = Run(path=work_dir / "runs" / "revived", output="")
    assert run.rows[-1]["rollout/engine_restarts"] == 1
    for step in (1, 5):
        assert [r["text"] for r in run.completions(step)] == [r["text"] for r in golden_run.completions(step)]
    assert [row["loss"] for row in run.rows[1:]] == [row["loss"] for row in golden_run.rows[1:]]


def arena_of(process: psutil.Process) -> Path | None:
    """The youngest of a trainer rank's shared blocks: what the engine reads and the trainer itself does not."""
    files = [Path(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
    blocks = [file for file in files if os.readlink(file).startswith("/memfd:mmrl-weights")]
    return max(blocks, key=lambda file: file.stat().st_ino, default=None)


def test_a_bit_that_flips_in_the_engines_weights_stops_the_run(work_dir: Path) -> None:
    """The vision tower is frozen, so that its weights are not copied again; 10 numbers in is its first layer."""
    process = start(
        work_dir,
        "flipped",
        "run.save_every=0",
        "parallel.tensor_model_parallel_size=1",
        "model.freeze=[vision]",
        "reshard.verify_every=1",
    )
    arenas = [arena for child in descendants(process) if "megatron_mmrl.train" in " ".join(child.cmdline())
              if (arena := arena_of(child))]  # fmt: skip
    with arenas[0].open("r+b") as memory:
        memory.seek(40)
        (byte,) = memory.read(1)
        memory.seek(40)
        memory.write(bytes([byte ^ 16]))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert "WeightsDifferError: engine of rank 0: engine 0 holds other weights than the trainer" in last, errors
    assert "visual.blocks.0.mlp.gate_up_proj.weight on rank 0;" in last
