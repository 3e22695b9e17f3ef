"""Evaluate: ``torchrun --nproc-per-node N -m megatron_mmrl.evaluate --config F --checkpoint D [key=value ...]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.checkpoint.output_dir import LOG_DIR
from megatron_mmrl.cluster.failure import run_rank
from megatron_mmrl.cluster.preflight import preflight
from megatron_mmrl.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from megatron_mmrl.build import Machinery


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of an evaluation; rank 0 prints the result as one line of JSON."""
    parser = argparse.ArgumentParser(prog="megatron_mmrl.evaluate", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="F", help="YAML file")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="D", help="step directory or HF directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    preflight(config, need="eval_files")
    run(config, options.checkpoint)
    return 0


def run(config: Config, checkpoint: Path) -> None:
    """Load the checkpoint's weights into the policy, hand them to the engine, answer and score."""
    from megatron_mmrl.build import machinery
    from megatron_mmrl.controller.evaluate import greedy_scores

    scratch = Path(config.run.output_dir) / LOG_DIR / "eval"
    with machinery(config, scratch) as machine:
        _load(machine, checkpoint)
        prompts = machine.eval_prompts(scratch / "quarantine.jsonl")
        machine.handover.publish(0)
        row = greedy_scores(prompts, machine.fleet, machine.scorer, machine.handover, sampling=machine.sampling, step=0)
        if machine.exchange.rank == 0:
            print(json.dumps({"checkpoint": str(checkpoint), "prompts": len(prompts), **row}))


def _load(machine: Machinery, checkpoint: Path) -> None:
    from megatron_mmrl.checkpoint.state import STATE_FILE, load_weights
    from megatron_mmrl.models.registry import load_model_weights

    chunks = machine.policy.chunks
    if (checkpoint / STATE_FILE).is_file():
        load_weights(checkpoint, chunks)
    elif (checkpoint / "config.json").is_file():
        load_model_weights([chunk.module for chunk in chunks], checkpoint)
    else:
        raise ConfigError(
            f"--checkpoint {checkpoint} is neither a step of a run ({STATE_FILE} is missing) nor a Hugging Face "
            "or converted Megatron checkpoint (config.json is missing)"
        )


if __name__ == "__main__":
    run_rank(main)
