"""Train: ``torchrun --nproc-per-node N -m megatron_mmrl.train --config F [key=value ...]``; one process per rank."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl import pulse
from megatron_mmrl.checkpoint.output_dir import CONFIG_FILE, LOG_DIR, claim_output_dir
from megatron_mmrl.cluster.failure import FAILURE_DIR, run_rank
from megatron_mmrl.cluster.preflight import preflight
from megatron_mmrl.cluster.stop import EXIT_REQUEUE, StopRequest
from megatron_mmrl.config import Config, dump_config, load_config

if TYPE_CHECKING:
    from megatron_mmrl.build import Machinery
    from megatron_mmrl.controller.parts import Parts
    from megatron_mmrl.metrics.run_log import RunLog


def main(argv: Sequence[str] | None = None) -> int:
    """One rank of a training run; EXIT_REQUEUE when it was asked to stop. Raises ConfigError before heavy imports."""
    stop = StopRequest()
    stop.listen(to_sigterm=FAILURE_DIR not in os.environ)  # our launchers send SIGUSR1, others' SIGTERM
    config = parse(argv)
    preflight(config)
    if int(os.environ.get("RANK", "0")) == 0:
        claim_output_dir(config)
    return 0 if run(config, stop) else EXIT_REQUEUE


def parse(argv: Sequence[str] | None) -> Config:
    """Read ``--config F [key=value ...]``."""
    parser = argparse.ArgumentParser(prog="megatron_mmrl.train", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="F", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set")
    options = parser.parse_args(argv)
    return load_config(options.config, options.overrides)


def run(config: Config, stop: StopRequest) -> bool:
    """Build this rank's parts, train, export; whether the run came to its end."""
    from megatron_mmrl.build import machinery

    output_dir = Path(config.run.output_dir)
    with machinery(config, Path(os.environ.get(FAILURE_DIR, output_dir / LOG_DIR))) as machine:
        if machine.exchange.rank == 0:
            (output_dir / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        session = Session(machine, output_dir, stop)
        finished = session.train()
        if finished and config.run.export_hf:
            machine.export(output_dir / "hf")
    return finished


class Session:
    """One run's state that outlives a process: data position, optimizer schedule, checkpoints, log."""

    def __init__(self, machine: Machinery, output_dir: Path, stop: StopRequest) -> None:
        from megatron_mmrl.checkpoint.manager import CheckpointManager

        cfg = machine.config
        self._machine, self._config, self._dir, self._stop = machine, cfg, output_dir, stop
        self._prompts = machine.prompts(
            cfg.data.train_files, output_dir / "quarantine.jsonl", max_rows=cfg.data.max_samples
        )
        self._num_steps = cfg.run.num_steps
        if self._num_steps is None:
            self._num_steps = math.ceil(self._prompts.num_prompts * cfg.run.num_epochs / cfg.rollout.prompts_per_step)
        self._checkpoints = CheckpointManager(
            output_dir / "checkpoints", keep=cfg.run.keep_checkpoints, collectives=machine.exchange
        )

    def train(self) -> bool:
        """Restore or warm up, then run the loop; whether it came to its end. If not, what it did is saved."""
        from megatron_mmrl.controller.loop import train
        from megatron_mmrl.metrics.run_log import RunLog
        from megatron_mmrl.trainer.kernels import kernels_in_use

        self._start_schedule()
        done = self._restore()
        log = RunLog(
            self._config.run,
            num_steps=self._num_steps,
            first_step=done + 1 if done else 0,
            exchange=self._machine.exchange,
        )
        parts = self._parts(log, done)
        log.note(kernels_in_use(self._machine.policy.chunks, self._machine.policy.optimizer))
        if done:
            log.note(f"continuing after step {done} of {self._num_steps}")
        if done == 0:
            self._warm_up(parts)
        if self._config.algorithm.kl_coef > 0:
            self._keep_reference(done)
        last = train(parts)
        if last < self._num_steps:
            self._save_at_stop(last, log)
        log.close()
        return last >= self._num_steps

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
            stop_asked=lambda: self._stop.asked,
        )

    @pulse.phase("optimizer")
    def _start_schedule(self) -> None:
        cfg = self._config
        sequences = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
        minibatches = math.ceil(sequences / (cfg.trainer.mini_batch_sequences or sequences))
        updates = self._num_steps * cfg.algorithm.num_iterations * minibatches
        self._machine.policy.start_optimizer(cfg.optim, total_updates=updates)

    @pulse.phase("warm-up")
    def _warm_up(self, parts: Parts) -> None:
        from megatron_mmrl.controller.supervised import warm_up

        supervised = self._config.supervised
        if supervised.num_steps == 0:
            return
        self._machine.policy.start_optimizer(supervised.optim, total_updates=supervised.num_steps)
        warm_up(parts, self._machine.processor.encode_text)
        self._start_schedule()

    @pulse.phase("reference model")
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

    @pulse.phase("restore")
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

    def _save_at_stop(self, step: int, log: RunLog) -> None:
        if step > 0:
            self._save(step)
        log.note(f"stopped as asked after step {step} of {self._num_steps}; continue with run.resume=auto")

    @pulse.phase("save")
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
