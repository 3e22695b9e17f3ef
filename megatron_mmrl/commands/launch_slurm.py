"""``mmrl launch slurm``: write the batch script of a run over several nodes and submit it."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.commands.launching import add_job, checked_job, planned

if TYPE_CHECKING:
    from megatron_mmrl.cluster.job import Job

SUMMARY = "train over nodes with Slurm: write a batch script and submit it"
DESCRIPTION = """\
Writes run.output_dir/logs/launch.slurm and submits it from this directory.
Needs no GPU here. Options of the job are the keys under cluster.slurm.
Before its time is up the job saves and queues itself again; so it does after
  scancel --signal=USR1 --batch JOB

  mmrl launch slurm --config F --nodes 2 --dry-run
  mmrl launch slurm --config F --nodes 2 cluster.slurm.partition=gpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)


def run(options: argparse.Namespace) -> int:
    """Submit, or with --dry-run print. Raises ConfigError for what cannot work."""
    from megatron_mmrl.checkpoint.output_dir import LOG_DIR
    from megatron_mmrl.cluster.describe import describe
    from megatron_mmrl.cluster.slurm import SCRIPT, render

    job = checked_job(options)
    plan = planned(job)
    script = render(job, sys.executable)
    if options.dry_run:
        print(describe(job.config, plan))
        print(script, end="")
        return 0
    path = Path(job.config.run.output_dir) / LOG_DIR / SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    print(_next_steps(job, path, _submit(path)), end="")
    return 0


def _submit(script: Path) -> str:
    """Hand the script to Slurm; the job's number. Raises ConfigError: Slurm is not here, or refuses."""
    from megatron_mmrl.config import ConfigError

    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(f"sbatch is not installed here; submit {script} where it is, from this directory") from error
    if done.returncode != 0:
        raise ConfigError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _next_steps(job: Job, script: Path, number: str) -> str:
    logs = script.parent
    return (
        f"job {number}: {job.topology.num_nodes} node(s) x {job.topology.ranks_per_node} ranks, script "
        f"{shlex.quote(str(script))}\n"
        f"  follow          tail -F {shlex.quote(str(logs / f'slurm-{number}.log'))} "
        f"{shlex.quote(str(logs / 'attempt_0' / 'job.log'))}\n"
        f"  logs of ranks   {shlex.quote(str(logs))}/attempt_*/rank*.log\n"
        f"  save and queue  scancel --signal=USR1 --batch {number}\n"
        f"  cancel          scancel {number}\n"
    )
