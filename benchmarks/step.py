"""Where a quickstart step's time goes, and what an idle engine costs.

    python -m benchmarks.step [--steps 20] [--json FILE] [key=value ...]

Runs the quickstart (preparing it first if needed), drops the first steps, and prints the median of each phase and the
share of the step that is neither generation, log-probs nor update. Then it starts one engine and measures the
processor time it takes while nobody asks it for anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from megatron_mmrl.commands.quickstart import CONFIG_FILE, PREPARED_DIR, prepare_quickstart
from megatron_mmrl.config import load_config
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_server import start_server

PHASES = ("generate", "reward", "logprobs", "update", "sync")
MODEL_WORK = ("generate", "logprobs", "update")
SKIP_STEPS = 3  # caches and allocators settle


def run_quickstart(steps: int, overrides: list[str], out_dir: Path) -> list[dict[str, float]]:
    """Rows of ``steps`` GRPO steps."""
    prepare_quickstart()
    command = [sys.executable, "-m", "megatron_mmrl.cli", "train", "--config", str(CONFIG_FILE)]
    settings = [f"run.output_dir={out_dir}", f"run.num_steps={steps}", "run.evaluate_every=0", "run.save_every=0"]
    subprocess.run([*command, *settings, "run.evaluate_before_training=false", *overrides], check=True)
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return rows[SKIP_STEPS:]


def shares(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each phase and of the whole step, and the median share outside the models' work."""
    result = {name: statistics.median(row[f"time/{name}_s"] for row in rows) for name in (*PHASES, "step")}
    outside = [1 - sum(row[f"time/{name}_s"] for name in MODEL_WORK) / row["time/step_s"] for row in rows]
    return result | {"outside_share": statistics.median(outside)}


def idle_engine_cores(seconds: float = 5.0) -> float:
    """Cores that a started engine takes while it has nothing to do."""
    config = load_config(CONFIG_FILE)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = Path(directory) / "model"
        Processor(str(PREPARED_DIR / "model"), config.data).write_engine_dir(model_dir)
        model = EngineModel(path=model_dir, dtype="float32", device="cpu")
        server = start_server(config.rollout, model, banned_token_ids=(), log_path=Path(directory) / "engine.log")
        try:
            server.wait_until_ready()
            time.sleep(3)  # start-up work ends
            return _cpu_seconds(server.pid, seconds) / seconds
        finally:
            server.stop()


def _cpu_seconds(pid: int, seconds: float) -> float:
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(seconds)
    return sum(sum(process.cpu_times()[:2]) for process in processes) - before


def main() -> None:
    """Measure, print the table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here as well")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as directory:
        numbers = shares(run_quickstart(options.steps, options.overrides, Path(directory) / "run"))
    numbers["idle_engine_cores"] = idle_engine_cores()
    print(f"\n{platform.machine()}, {psutil.cpu_count()} cores, median of {options.steps - SKIP_STEPS} steps")
    for name in (*PHASES, "step"):
        print(f"{name:<10}{numbers[name]:8.3f} s{numbers[name] / numbers['step']:8.1%}")
    print(f"outside generate, logprobs and update: {numbers['outside_share']:.1%} of a step (goal: at most 10%)")
    print(f"idle engine: {numbers['idle_engine_cores']:.3f} cores")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
