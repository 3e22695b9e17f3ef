"""What the golden file holds, and how to write it anew: ``python -m tests.golden.update RUN_DIR``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.e2e.run import Run

GOLDEN_FILE = Path(__file__).parent / "quickstart.json"
EXACT = {
    "step",
    "reward/mean",
    "reward/accuracy",
    "reward/format",
    "response_tokens/mean",
    "eval/accuracy",
    "tokens",
}
NEAR = {"loss", "grad_norm", "entropy", "lr", "clip_fraction", "kl"}


def golden_numbers(run: Run) -> dict:
    """The comparable part of a run: metrics without times, and every sampled text of the first and last step."""
    rows = [{name: row[name] for name in sorted(row.keys() & (EXACT | NEAR))} for row in run.rows]
    texts = {step: [record["text"] for record in run.completions(step)] for step in (1, len(rows) - 1)}
    return {"rows": rows, "texts": {str(step): values for step, values in texts.items()}}


if __name__ == "__main__":
    golden = golden_numbers(Run(path=Path(sys.argv[1]), output=""))
    GOLDEN_FILE.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
