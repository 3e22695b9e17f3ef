"""Every preset from raw rows of its data set to a trained model, by the scripts of its example, with a tiny model.

Only sizes are overridden: texts, rewards, algorithm, freezing, schedule and recomputation are the preset's own.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from megatron_mmrl.data.template import load_template, shipped_templates
from megatron_mmrl.models.tiny import make_tiny_checkpoint
from tests.e2e import raw_rows
from tests.e2e.run import REPOSITORY, Run, environment

SIZES = (
    "model.path=model", "model.dtype=float32", "parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=1",
    "rollout.num_engines=1", "rollout.tensor_parallel_size=1", "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=2", "rollout.max_response_tokens=12", "rollout.max_total_tokens=16384",
    "rollout.mem_fraction_static=0.8", "rollout.startup_timeout_s=240", "reward.num_workers=1", "run.num_steps=1",
    "run.max_eval_prompts=2", "data.max_samples=null",
)  # fmt: skip
TIMEOUT_S = 280.0
TWO_UPDATES = "trainer.mini_batch_sequences=2"
full = pytest.mark.full

CASES = [
    pytest.param("siirl_mm_eureka", "siirl_mm_eureka_7b", raw_rows.siirl, (TWO_UPDATES,), id="siirl_mm_eureka_7b"),
    pytest.param(
        "mm_eureka", "mm_eureka_7b", raw_rows.mm_eureka,
        (TWO_UPDATES, "algorithm.accuracy_filter.lower=0", "algorithm.adora.enabled=true"),
        id="mm_eureka_7b", marks=full,
    ),
    pytest.param(
        "mm_eureka", "mm_eureka_32b", raw_rows.mmk12,
        (TWO_UPDATES, "algorithm.dynamic_sampling.max_rounds=2", "algorithm.aggregation=token_mean"),
        id="mm_eureka_32b", marks=full,
    ),
    pytest.param(
        "verl_boxed_math", "verl_boxed_7b", raw_rows.boxed_math, (TWO_UPDATES,), id="verl_boxed_7b", marks=full
    ),
    pytest.param(
        "clevr_count", "clevr_count_3b", raw_rows.r1v("How many items are there in the image?"), (),
        id="clevr_count_3b", marks=full,
    ),
    pytest.param("geoqa", "geoqa_3b", raw_rows.r1v("In {n}, what is angle ABC?"), (), id="geoqa_3b"),
    pytest.param(
        "open_r1", "open_r1_3b", raw_rows.r1v("Which state is {n}?\nA. Utah\nB. Ohio"), (), id="open_r1_3b", marks=full
    ),
    pytest.param("mathvista_dr_grpo", "mathvista_dr_grpo", raw_rows.mathvista, (), id="mathvista_dr_grpo", marks=full),
]  # fmt: skip
TERMS = {
    "siirl": {"accuracy", "format"}, "mm_eureka": {"accuracy", "format"}, "verl_boxed": {"boxed"},
    "swift_r1v": {"accuracy", "format"}, "gemma_math": {"accuracy", "format"},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like the repository's root: examples, presets, a tiny model, and the commands on the path.

    Its name has a space, as those of users may.
    """
    path = tmp_path_factory.mktemp("presets") / "my copy"
    for folder in ("examples", "configs"):
        shutil.copytree(REPOSITORY / folder, path / folder)
    templates = [load_template(name) for name in shipped_templates()]
    texts = [text for each in templates for text in (each.system, each.before, each.after) if text]
    make_tiny_checkpoint(path / "model", texts=[*texts, "What is the answer? How many items are there?"])
    (path / "bin").mkdir()
    for name, module in (("mmrl", "megatron_mmrl.cli"), ("torchrun", "torch.distributed.run")):
        command = path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        command.chmod(0o755)
    return path


def script(home: Path, name: str, *arguments: str, cwd: Path) -> str:
    """Run a script of an example as a user does, from any directory; its output, once it has succeeded."""
    done = subprocess.run(
        ["sh", str(home / "examples" / name), *arguments],
        cwd=cwd,
        env={**environment(), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", **one_process()},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def one_process() -> dict[str, str]:
    """What the scripts read: one GPU, and for the one of several nodes a single one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    return {"GPUS": "1", "NODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.mark.parametrize(("example", "preset", "write_raw", "overrides"), CASES)
def test_from_raw_rows_to_a_model(
    home: Path,
    tmp_path: Path,
    example: str,
    preset: str,
    write_raw: Callable[[Path], Sequence[str]],
    overrides: Sequence[str],
) -> None:
    settings = yaml.safe_load((home / "configs" / "presets" / f"{preset}.yaml").read_text())
    raw = tmp_path / "raw rows"
    raw.mkdir()
    shutil.rmtree(home / "data", ignore_errors=True)
    raw_files = [os.path.relpath(file, tmp_path) for file in write_raw(raw)]
    script(home, f"{example}/prepare.sh", *raw_files, cwd=tmp_path)
    files = [home / file for file in settings["data"]["train_files"]]
    assert all(file.is_file() for file in files), sorted((home / "data").rglob("*.parquet"))
    run = Run(path=tmp_path / "the run", output="")
    train = "train_32b.sh" if preset == "mm_eureka_32b" else "train.sh"
    script(home, f"{example}/{train}", f"run.output_dir={run.path}", *SIZES, *overrides, cwd=tmp_path)
    check(run, settings)


def check(run: Run, settings: dict) -> None:
    """The step was made with the preset's rewards and algorithm, and its model was written."""
    row = run.rows[-1]
    assert row["step"] == 1
    assert (run.rows[0]["step"] == 0) == settings["run"]["evaluate_before_training"]
    assert ("eval/reward" in row) == ("eval_files" in settings["data"])
    terms = {name.removeprefix("reward/") for name in row if name.startswith("reward/")}
    assert terms >= TERMS[settings["reward"]["preset"]]
    assert math.isfinite(row["reward/mean"])
    assert row["data/bad_rows"] == row["data/dropped"] == row["data/too_long"] == 0
    if row["updates"]:
        assert row["updates"] == settings["algorithm"].get("num_iterations", 1) * (
            2 if "mini_batch_sequences" in settings["trainer"] else 1
        )
        assert math.isfinite(row["loss"])
        assert row["mismatch/max_abs"] <= 1e-4
        assert ("kl" in row) or settings["algorithm"]["kl_coef"] == 0
    else:
        assert settings["algorithm"]["accuracy_filter"]["enabled"]  # a random model answers nothing: all are left out
    assert (run.path / "hf" / "config.json").is_file()
    assert list((run.path / "checkpoints").iterdir())
    assert len(run.completions(1)) >= 4
