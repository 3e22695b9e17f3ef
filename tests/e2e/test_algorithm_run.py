"""A run whose steps depend on all they can: filter, dynamic sampling, penalty, moving reference; then resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.run import train

SETTINGS = (
    "run.num_steps=4",
    "run.export_hf=false",
    "run.evaluate_before_training=false",
    "run.max_eval_prompts=8",
    "run.tensorboard=false",
    "parallel.tensor_model_parallel_size=1",
    "parallel.data_parallel_size=2",
    "rollout.prompts_per_step=4",
    "rollout.repetition_penalty=1.05",
    "algorithm.name=reinforce_pp",
    "algorithm.kl_coef=0.05",
    "algorithm.kl_in=reward",
    "algorithm.kl_estimator=k1",
    "algorithm.reference_refresh_every=2",
    "algorithm.accuracy_filter={enabled: true, term: format, freezing_steps: 1}",
    "algorithm.mask_overlong=true",
    "algorithm.dynamic_sampling={enabled: true, max_rounds: 3, oversample: 1.25}",
    "algorithm.mismatch_mask.level=sequence",
    "optim.lr=1e-4",
    "optim.warmup_updates=0",
    "optim.warmup_fraction=0.1",
    "optim.clip_grad=0.5",
)


@pytest.mark.full  # two runs, a minute of two cores
def test_a_step_with_everything_resumes_bit_for_bit(work_dir: Path) -> None:
    unbroken = train(work_dir, "algorithm", SETTINGS)
    rows = unbroken.rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["sampling/generated"] == sum(row[f"sampling/{name}"] for name in ("refused", "surplus", "used"))
        assert row["mismatch/max_abs"] <= 1e-4  # the engine's log-probs know of the penalty, and the trainer's too
    assert rows[0]["sampling/rounds"] == 1  # frozen: nothing is refused, four of five are needed
    assert (rows[0]["sampling/generated"], rows[0]["sampling/surplus"]) == (5, 1)
    assert sum(row["sampling/refused"] for row in rows[1:]) > 0
    assert max(row["sampling/rounds"] for row in rows) > 1
    # The reference is the policy at the start of steps 1 and 3, and one step older in steps 2 and 4.
    assert [abs(row["kl"]) > 1e-6 for row in rows] == [False, True, False, True]

    resumed = work_dir / "runs" / "algorithm_resumed"
    shutil.copytree(unbroken.path, resumed, ignore=shutil.ignore_patterns("step_4", "curve.png"))
    again = train(work_dir, "algorithm_resumed", (*SETTINGS, "run.resume=auto"))
    timed = ("time/", "tokens_per_second", "straggler/")
    for ours, theirs in zip(again.rows, rows, strict=True):
        assert {k: v for k, v in ours.items() if not k.startswith(timed)} == {
            k: v for k, v in theirs.items() if not k.startswith(timed)
        }
    assert again.completions(4) == unbroken.completions(4)
