"""What a run leaves, in which layouts it runs, and how it goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.e2e.run import CONFIG, SMALL, Run, finished, mmrl, train, untimed

REQUIRED = {
    "step", "reward/mean", "reward/accuracy", "reward/format", "response_tokens/mean", "loss", "grad_norm", "entropy",
    "clip_fraction", "kl", "mismatch/mean_abs", "mismatch/max_abs", "time/generate_s", "time/reward_wait_s",
    "time/logprobs_s", "time/update_s", "time/sync_s", "time/step_s", "tokens_per_second", "reward/timeouts",
    "straggler/step/rank", "straggler/generate/busy_s", "straggler/update/ratio",
}  # fmt: skip


def test_what_a_run_leaves(golden_run: Run) -> None:
    rows = golden_run.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert "eval/accuracy" in rows[0]
    assert "loss" not in rows[0]
    assert "eval/accuracy" in rows[-1]
    for row in rows[1:]:
        assert row.keys() >= REQUIRED
        assert all(value is None or math.isfinite(value) for value in row.values())
        assert row["mismatch/max_abs"] <= 1e-4
    assert len((golden_run.path / "supervised.jsonl").read_text().splitlines()) == 8
    assert [path.name for path in sorted((golden_run.path / "checkpoints").iterdir())] == ["step_2", "step_4", "step_5"]
    assert list((golden_run.path / "tensorboard").glob("events.*"))
    assert (golden_run.path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (golden_run.path / "config.yaml").is_file()
    records = golden_run.completions(1)
    assert len(records) == 8 * 4
    assert records[0].keys() >= {"prompt_id", "text", "terms", "length", "finish"}
    groups = {record["prompt_id"]: [] for record in records}
    for record in records:
        groups[record["prompt_id"]].append(record["text"])
    assert any(len(set(texts)) > 1 for texts in groups.values()), "the samples of a prompt must differ"
    assert golden_run.output.count("Adam: AdamW of torch ") == 1  # said once, by rank 0


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2",
             "rollout.tensor_parallel_size=2"),
            id="PP2-engineTP2", marks=pytest.mark.full,
        ),
        pytest.param(("parallel.pipeline_model_parallel_size=2",), id="TP2xPP2"),
        pytest.param(
            ("parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=2",
             "trainer.mini_batch_sequences=16", "algorithm.kl_coef=0.01", "trainer.packing=false",
             "rollout.num_engines=2"),
            id="DP2-engines2-minibatches-KL-padded",
        ),
        pytest.param(("reshard.method=reference",), id="weights-by-name"),
        pytest.param(("rollout.tensor_parallel_size=2", "reshard.verify_every=1"), id="TP2-engineTP2",
                     marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_layouts_by_override(work_dir: Path, golden_run: Run, overrides: tuple[str, ...], request) -> None:
    """Other layouts see the same first rollout and make the same first step of it."""
    run = train(work_dir, request.node.callspec.id, ("run.num_steps=2", "run.export_hf=false", *overrides))
    first, golden = run.rows[1], golden_run.rows[1]
    assert run.rows[0]["eval/accuracy"] == golden_run.rows[0]["eval/accuracy"]
    assert [r["text"] for r in run.completions(1)] == [r["text"] for r in golden_run.completions(1)]
    assert all(row["mismatch/max_abs"] <= 1e-4 for row in run.rows[1:])
    if "trainer.mini_batch_sequences=16" not in overrides:
        assert first["loss"] == pytest.approx(golden["loss"], abs=1e-5)
        assert first["entropy"] == pytest.approx(golden["entropy"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-3)
    else:
        assert first["updates"] == 2
        assert run.rows[2]["kl"] > 0  # the reference model is that of step 0
        assert first["time/logprobs_s"] > 0


def test_resumed_run_is_bit_equal(work_dir: Path, golden_run: Run) -> None:
    resumed = work_dir / "runs" / "resumed"
    shutil.copytree(golden_run.path, resumed, ignore=shutil.ignore_patterns("step_4", "step_5", "hf", "curve.png"))
    run = train(work_dir, "resumed", ("run.resume=auto",))
    assert untimed(run.rows) == untimed(golden_run.rows)
    assert run.completions(5) == golden_run.completions(5)
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (run.path, golden_run.path))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("run.resume=auto", "run.seed=1"), "holds another run: run.seed is 0 there and 1 now"),
        (("run.resume=never",), "already holds a run; use another directory, or run.resume=auto"),
    ],
)
def test_another_run_is_not_mixed_in(work_dir: Path, golden_run: Run, overrides: tuple[str, ...], reason: str) -> None:
    before = golden_run.rows
    code, output = finished(work_dir, "train", "run.output_dir=runs/golden", *SMALL, *overrides)
    assert code == 2
    assert reason in output.splitlines()[-1]
    assert golden_run.rows == before


def test_export_answers_the_same_in_transformers(work_dir: Path, golden_run: Run) -> None:
    """``hf/`` loads in transformers, whose greedy answers have the accuracy that the run reported."""
    from megatron_mmrl.config import load_config
    from megatron_mmrl.data.processor import Processor
    from megatron_mmrl.data.source import prompt_source
    from megatron_mmrl.rewards.accuracy import accuracy

    config = load_config(CONFIG, [f"model.path={golden_run.path / 'hf'}"])
    processor = Processor(config.model.path, config.data)
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32)
    files = [str(work_dir / "runs" / "prepared" / "test.parquet")]
    source = prompt_source(files, config.data, processor, seed=0, quarantine_path=work_dir / "none.jsonl")
    correct = []
    for encoded in source.all(32):
        ids = torch.from_numpy(encoded.ids)[None]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == processor.image_token_id).long(),
            pixel_values=torch.from_numpy(encoded.pixel_values),
            image_grid_thw=torch.from_numpy(encoded.image_grid_thw),
            max_new_tokens=config.rollout.max_response_tokens,
            do_sample=False,
            suppress_tokens=list(processor.banned_token_ids()),
        )
        correct.append(accuracy(encoded.prompt, processor.decode(out[0, len(encoded.ids) :].numpy())))
    assert np.mean(correct) == golden_run.rows[-1]["eval/accuracy"]


@pytest.mark.parametrize("checkpoint", ["checkpoints/step_5", pytest.param("hf", marks=pytest.mark.full)])
def test_eval_command(work_dir: Path, golden_run: Run, checkpoint: str) -> None:
    settings = ("run.output_dir=runs/eval", "run.max_eval_prompts=32")
    output = mmrl(work_dir, "eval", "--checkpoint", str(golden_run.path / checkpoint), *settings)
    result = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert result["prompts"] == 32
    assert result["eval/accuracy"] == golden_run.rows[-1]["eval/accuracy"]
