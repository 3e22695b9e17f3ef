"""A run over hostile data: bad rows are named and set aside, a reward that hangs costs its response only."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.run import finished, read_jsonl, train

ONE_RANK = ("parallel.tensor_model_parallel_size=1", "run.num_steps=2", "run.export_hf=false", "run.save_every=0")
PLUGIN = """
import time

def sleepy(prompt, text):
    if int(prompt.id.rsplit(":", 1)[1]) % 7 == 5:
        time.sleep(3600)
    return 1.0
"""


def replaced(row: dict, **changes: object) -> dict:
    return {**row, **changes}


def hostile_rows(rows: list[dict]) -> list[dict]:
    """One row of each kind of fault, at indices 0 .. 4; index 5 has a gold answer that nothing can parse."""
    image = rows[0]["images"][0]["bytes"]
    gold = {"style": "rule", "ground_truth": "cat and dog"}
    return [
        replaced(rows[0], images=[{"bytes": image[: len(image) // 2], "path": None}]),
        replaced(rows[1], images=[{"bytes": b"", "path": None}]),
        replaced(rows[2], images=[{"bytes": None, "path": "/etc/passwd"}]),
        replaced(rows[3], reward_model={"style": "rule", "ground_truth": None}),
        replaced(rows[4], images=[]),
        replaced(rows[5], reward_model=gold),
        *rows[6:64],
    ]


@pytest.fixture(scope="module")
def hostile_file(work_dir: Path) -> str:
    table = pq.read_table(work_dir / "runs" / "prepared" / "train.parquet")
    path = work_dir / "hostile.parquet"
    pq.write_table(pa.Table.from_pylist(hostile_rows(table.to_pylist()), table.schema), path)
    return str(path)


def test_run_goes_on_over_bad_rows_and_a_hanging_reward(work_dir: Path, hostile_file: str) -> None:
    (work_dir / "sleepy_reward.py").write_text(PLUGIN)
    run = train(
        work_dir,
        "hostile",
        (
            *ONE_RANK,
            f"data.train_files=[{hostile_file}]",
            "data.shuffle=false",
            "data.max_bad_fraction=0.1",
            "reward.terms=[{name: accuracy},{name: format},{name: 'sleepy_reward:sleepy'}]",
            "reward.timeout_s=1",
            "supervised.num_steps=1",
            "supervised.batch_sequences=8",
        ),
    )
    records = read_jsonl(run.path / "quarantine.jsonl")
    assert sorted((record["file"], record["row"]) for record in records) == [
        ("hostile.parquet", row) for row in range(5)
    ]
    assert all(record["reason"] for record in records)
    last = run.rows[-1]
    assert last["data/bad_rows"] == 5
    assert last["data/dropped"] == 1
    assert sum(row["reward/timeouts"] for row in run.rows[1:]) >= 4
    slow = [record for step in (1, 2) for record in run.completions(step) if record["error"]]
    assert slow
    assert all(record["reward"] == 0 and int(record["prompt_id"].split(":")[1]) % 7 == 5 for record in slow)


def test_too_many_bad_rows_stop_the_run_with_a_count(work_dir: Path, hostile_file: str) -> None:
    code, output = finished(
        work_dir,
        "train",
        "run.output_dir=runs/stopped",
        *ONE_RANK,
        f"data.train_files=[{hostile_file}]",
        "data.max_bad_fraction=0",
        "data.shuffle=false",
    )
    assert code == 1
    assert "of 64 rows are bad, more than the 0 that data.max_bad_fraction=0.0 allows" in output.splitlines()[-1]
    assert not (work_dir / "runs" / "stopped" / "hf").exists()
