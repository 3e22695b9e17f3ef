"""Train: ``torchrun --nproc-per-node N -m megatron_mmrl.train --config F [key=value ...]``; one process per rank."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.checkpoint.output_dir import CONFIG_FILE, LOG_DIR, claim_output_dir
from megatron_mmrl.cluster.failure import run_rank
from megatron_mmrl.cluster.preflight import preflight
from megatron_mmrl.config import Config, dump_config, load_config

if TYPE_CHECKING:
    from megatron_mmrl.build import Machinery
    from megatron_mmrl.controller.parts import Parts
    from megatron_mmrl.metrics.run_log import RunLog


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of a training run. Raises ConfigError before anything heavy is imported."""
    config = parse(argv)
    preflight(config)
    if int(os.environ.get("RANK", "0")) == 0:
        claim_output_dir(config)
    run(config)
    return 0


def parse(argv: Sequence[str] | None) -> Config:
    """Read ``--config F [key=value ...]``."""
    parser = argparse.ArgumentParser(prog="megatron_mmrl.train", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="F", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set")
    options = parser.parse_args(argv)
    return load_config(options.config, options.overrides)


def run(config: Config) -> None:
    """Build this rank's parts, train, export."""
    from megatron_mmrl.build import machinery

    output_dir = Path(config.run.output_dir)
    with machinery(config, output_dir / LOG_DIR) as machine:
        if machine.exchange.rank == 0:
            (output_dir / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        session = Session(machine, output_dir)
        session.train()
        if config.run.export_hf:
            machine.export(output_dir / "hf")


class Session:
    """One run's state that outlives a process: data position, optimizer schedule, checkpoints, log."""

    def __init__(self, machine: Machinery, output_dir: Path) -> None:
        from megatron_mmrl.checkpoint.manager import CheckpointManager

        cfg = machine.config
        self._machine, self._config, self._dir = machine, cfg, output_dir
        self._prompts = machine.prompts(
            cfg.data.train_files, output_dir / "quarantine.jsonl", max_rows=cfg.data.max_samples
        )
        self._num_steps = cfg.run.num_steps
        if self._num_steps is None:
            self._num_steps = math.ceil(self._prompts.num_prompts * cfg.run.num_epochs / cfg.rollout.prompts_per_step)
        self._checkpoints = CheckpointManager(
            output_dir / "checkpoints", keep=cfg.run.keep_checkpoints, collectives=machine.exchange
        )

    def train(self) -> None:
        """Restore or warm up, then run the loop."""
        from megatron_mmrl.controller.loop import train
        from megatron_mmrl.metrics.run_log import RunLog

        self._start_schedule()
        done = self._restore()
        log = RunLog(
            self._config.run,
            num_steps=self._num_steps,
            first_step=done + 1 if done else 0,
            writes=self._machine.exchange.rank == 0,
        )
        parts = self._parts(log, done)
        if done:
            log.note(f"continuing after step {done} of {self._num_steps}")
        if done == 0:
            self._warm_up(parts)
        if self._config.algorithm.kl_coef > 0:
            self._keep_reference(done)
        train(parts)
        log.close()

    def _parts(self, log: RunLog, done: int) -> Parts:
        from megatron_mmrl.controller.parts import Parts

        machine, cfg = self._machine, self._config
        return Parts(
            config=cfg,
            policy=machine.policy,
            fleet=machine.fleet,
            scorer=machine.scorer,
            algorithm=machine.algorithm,
            packer=machine.packer,
            prompts=self._prompts,
            eval_prompts=machine.eval_prompts(self._dir / "quarantine.jsonl"),
            sampling=machine.sampling,
            handover=machine.handover,
            log=log,
            exchange=machine.exchange,
            num_steps=self._num_steps,
            start_step=done,
            save=self._save,
        )

    def _start_schedule(self) -> None:
        cfg = self._config
        sequences = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
        minibatches = math.ceil(sequences / (cfg.trainer.mini_batch_sequences or sequences))
        updates = self._num_steps * cfg.algorithm.num_iterations * minibatches
        self._machine.policy.start_optimizer(cfg.optim, total_updates=updates)

    def _warm_up(self, parts: Parts) -> None:
        from megatron_mmrl.controller.supervised import warm_up

        supervised = self._config.supervised
        if supervised.num_steps == 0:
            return
        self._machine.policy.start_optimizer(supervised.optim, total_updates=supervised.num_steps)
        warm_up(parts, self._machine.processor.encode_text)
        self._start_schedule()

    def _keep_reference(self, done: int) -> None:
        """The reference model is the policy at step 0, kept in a file of its own for runs that resume.

        One that is refreshed is in the checkpoints as well, as it was then.
        """
        from megatron_mmrl.checkpoint.state import load_reference

        path, policy = self._dir / "reference", self._machine.policy
        if done == 0:
            self._machine.export(path)
        policy.keep_reference(path)
        latest = self._checkpoints.latest()
        if done and latest is not None and self._config.algorithm.reference_refresh_every:
            self._checkpoints.load(latest, lambda checkpoint: load_reference(checkpoint, policy.reference))

    def _restore(self) -> int:
        """Load the newest whole checkpoint; returns how many steps are done."""
        from megatron_mmrl.checkpoint.state import load_training_state

        latest = self._checkpoints.latest() if self._config.run.resume == "auto" else None
        if latest is None:
            return 0
        policy = self._machine.policy
        extra = self._checkpoints.load(latest, lambda path: load_training_state(path, policy.chunks, policy.optimizer))
        self._prompts.load_state_dict(extra["prompts"])
        policy.num_updates = extra["num_updates"]
        return extra["step"]

    def _save(self, step: int) -> None:
        from megatron_mmrl.checkpoint.state import save_reference, save_training_state

        policy = self._machine.policy
        extra = {"step": step, "num_updates": policy.num_updates, "prompts": self._prompts.state_dict()}

        def write(path: Path) -> None:
            save_training_state(path, policy.chunks, policy.optimizer, extra)
            if self._config.algorithm.reference_refresh_every:
                save_reference(path, policy.reference)

        self._checkpoints.save(step, write)


if __name__ == "__main__":
    run_rank(main)
