"""``mmrl eval`` with several samples: the table, the JSON and the answers tell the same story."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl.metrics.pass_at_k import pass_at_k
from tests.e2e.run import Run, mmrl, read_jsonl


def test_sampled_evaluation(work_dir: Path, golden_run: Run) -> None:
    """On one rank, from a run of two: the weights travel as a Hugging Face directory."""
    output = mmrl(
        work_dir, "eval", "--checkpoint", str(golden_run.path / "hf"), "--samples", "4", "--temperature", "0.7",
        "--top-p", "0.95", "--by", "ability", "--json", "result.json", "--output", "answers.jsonl",
        "run.output_dir=runs/sampled", "run.max_eval_prompts=24", "rollout.max_running_requests=64",
        "parallel.tensor_model_parallel_size=1",
    )  # fmt: skip
    result = json.loads((work_dir / "result.json").read_text())
    assert json.loads(output.splitlines()[-1]) == result
    answers = read_jsonl(work_dir / "answers.jsonl")
    assert len(answers) == 24 * 4
    assert [answer["sample"] for answer in answers] == list(range(4)) * 24
    right = np.array([answer["correct"] for answer in answers]).reshape(24, 4)
    assert [answer["terms"]["accuracy"] == 1.0 for answer in answers] == right.ravel().tolist()
    assert 0 < right.mean() < 1
    assert {len({answer["text"] for answer in answers[at : at + 4]}) for at in range(0, 96, 4)} != {1}
    whole, source, ability = result["results"]
    assert (whole["column"], source["column"], ability["value"]) == ("all", "data_source", "digits")
    assert whole["prompts"] == source["prompts"] == result["prompts"] == 24
    assert whole["pass@1[4]"]["mean"] == pytest.approx(right.mean())
    assert whole["pass@1[4]"]["error"] == pytest.approx(right.mean(axis=1).std(ddof=1) / np.sqrt(24))
    assert whole["pass@4"]["mean"] == pytest.approx(right.any(axis=1).mean())
    assert whole["pass@2"]["mean"] == pytest.approx(np.mean([pass_at_k(4, int(c), 2) for c in right.sum(axis=1)]))
    assert result["eval/accuracy"] == pytest.approx(right.mean())
    assert f"{100 * right.mean():.2f} ±" in output
