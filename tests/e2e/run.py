"""Run ``mmrl`` as a user does, and read what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"

# The quickstart, made small: few prompts, few warm-up steps, and draws that depend on (seed, step, prompt, sample).
SMALL = (
    "rollout.deterministic=true",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "supervised.num_steps=8",
    "supervised.batch_sequences=32",
    "run.num_steps=5",
    "run.max_eval_prompts=32",
    "run.evaluate_every=0",
    "run.save_every=2",
    "run.keep_checkpoints=0",
    "trainer.mini_batch_sequences=null",
    "optim.schedule=constant",
    "optim.warmup_updates=2",
    "optim.lr=1e-3",
)
# A layout that can be one rank to a node.
TWO_RANKS = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.data_parallel_size=2",
    "rollout.num_engines=2",
    "run.num_steps=3",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished command and its output directory."""

    path: Path
    output: str

    @property
    def rows(self) -> list[dict[str, float]]:
        """``metrics.jsonl``, one dict per row."""
        return read_jsonl(self.path / "metrics.jsonl")

    def completions(self, step: int) -> list[dict]:
        return read_jsonl(self.path / "completions" / f"step_{step}.jsonl")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What a repetition of the run gives again, bit for bit: all but what a clock measured."""
    clocked = ("time/", "tokens_per_second", "straggler/")
    return [{key: value for key, value in row.items() if not key.startswith(clocked)} for row in rows]


def command(subcommand: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_mmrl.cli", subcommand, "--config", str(CONFIG), *arguments]


def mmrl(work_dir: Path, subcommand: str, *arguments: str, timeout_s: float = 280) -> str:
    """Run a command in ``work_dir``; fails the test, with output and logs, unless it exits with 0."""
    code, output = finished(work_dir, subcommand, *arguments, timeout_s=timeout_s)
    assert code == 0, f"exit code {code}\n{output}\n{_logs(work_dir)}"
    return output


def finished(work_dir: Path, subcommand: str, *arguments: str, timeout_s: float = 280) -> tuple[int, str]:
    """Run a command in ``work_dir``; its exit code, and what it wrote."""
    done = subprocess.run(
        command(subcommand, *arguments),
        cwd=work_dir,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def train(work_dir: Path, name: str, overrides: Sequence[str] = ()) -> Run:
    """``mmrl train`` of the small quickstart into ``runs/<name>``."""
    output = mmrl(work_dir, "train", f"run.output_dir=runs/{name}", *SMALL, *overrides)
    return Run(path=work_dir / "runs" / name, output=output)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def _logs(work_dir: Path) -> str:
    return "\n".join(
        f"--- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(work_dir.glob("runs/*/logs/*.log"))
    )
