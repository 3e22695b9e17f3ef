"""Five deterministic steps give the numbers that stand in ``tests/golden/quickstart.json``.

``python -m tests.golden.update`` rewrites the file; a change of it belongs into the commit that explains it.
"""

from __future__ import annotations

import json

import pytest

from tests.e2e.run import Run
from tests.golden.update import EXACT, GOLDEN_FILE, NEAR, golden_numbers


def test_numbers_of_five_steps(golden_run: Run) -> None:
    golden, ours = json.loads(GOLDEN_FILE.read_text()), golden_numbers(golden_run)
    assert [row["step"] for row in ours["rows"]] == [0, 1, 2, 3, 4, 5]
    for expected, row in zip(golden["rows"], ours["rows"], strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() & EXACT:
            assert row[name] == expected[name], (row["step"], name)
        for name in row.keys() & NEAR:  # float32 sums differ between processors
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), (row["step"], name)
    assert ours["texts"] == golden["texts"]
