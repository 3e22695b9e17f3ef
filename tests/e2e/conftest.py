"""One prepared quickstart and one finished run, shared by all whole-run tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mmrl.data.digits import DigitsOptions
from megatron_mmrl.quickstart import prepare
from tests.e2e.run import TWO_RANKS, Run, train


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``runs/prepared``, as ``mmrl quickstart`` makes it."""
    path = tmp_path_factory.mktemp("e2e")
    prepare(path / "runs" / "prepared", DigitsOptions(train_rows=256, test_rows=64, untagged_share=0.0))
    return path


@pytest.fixture(scope="session")
def golden_run(work_dir: Path) -> Run:
    """Five deterministic steps at the quickstart's layout (TP 2 with sequence parallelism)."""
    return train(work_dir, "golden")


@pytest.fixture(scope="session")
def two_rank_run(work_dir: Path) -> Run:
    """Three deterministic steps of two data-parallel ranks with an engine each, all on this host."""
    return train(work_dir, "two_ranks", TWO_RANKS)
