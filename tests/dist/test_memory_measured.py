"""The memory estimate against what ranks of a real policy take: their tensors, and what an update allocates."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import CASES, TOLERANCE, Case, Comparison, compare, config_of
from benchmarks.memory_measure import measure
from megatron_mmrl.memory.activations import in_flight
from megatron_mmrl.parallel.layout import ParallelLayout
from tests.dist.launch import run_ranks

QUICK = ("one rank, merger trained", "bfloat16, reference", "tensor 2, sequence parallel", "pipeline 2",
         "pipeline 2 x 2 chunks", "data 2, full recompute", "data 2, plain optimizer", "context 2")  # fmt: skip


def measured(case: Case, model_path: Path) -> list[Comparison]:
    config = config_of(case, model_path)
    ranks = run_ranks(measure, case.world_size, config, case)
    return [compare(case, config, rank, one) for rank, one in enumerate(ranks)]


def check(case: Case, model_path: Path) -> None:
    rows = measured(case, model_path)
    for row in rows:
        for part in ("weights", "gradients", "reference"):
            assert row.estimated[part] == row.measured[part], (part, row)
        # The shares of the ranks differ by what rounds the buffers.
        assert row.estimated["optimizer"] == pytest.approx(row.measured["optimizer"], rel=1e-3), row
        assert row.estimated["activations"] == pytest.approx(row.measured["activations"], rel=TOLERANCE), row
        assert row.ratio == pytest.approx(1, rel=TOLERANCE), row
    assert all(row.measured["activations"] > row.measured["weights"] for row in rows)  # or nothing was watched


@pytest.mark.parametrize("case", [case for case in CASES if case.name in QUICK], ids=lambda case: case.name)
def test_each_part_is_what_a_rank_takes(case: Case, model_path: Path) -> None:
    check(case, model_path)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in QUICK], ids=lambda case: case.name)
def test_each_part_is_what_a_rank_takes_elsewhere(case: Case, model_path: Path) -> None:
    check(case, model_path)


def test_micro_batches_in_flight() -> None:
    four = ParallelLayout(pipeline=4)
    assert [in_flight(four, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(four, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    chunks = ParallelLayout(pipeline=2, virtual_pipeline=2)
    assert [in_flight(chunks, stage, 8) for stage in range(2)] == [5, 3]  # 2 x 1 + 1 x 2 + 1, and 0 + 2 + 1
    assert in_flight(chunks, 0, 2) == 4  # of 2 micro-batches there are 4 passes
