"""A run as one Slurm batch script, which asks for nodes, starts every node's share, and queues itself again. Pure.

Slurm signals the batch shell some time before the job's time is up; the shell passes that on to ``srun``, which passes
it on to the tasks, each of which asks its ranks to save. What matters of the rest is in the comments of ``_SCRIPT``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from megatron_mmrl.checkpoint.output_dir import LOG_DIR
from megatron_mmrl.cluster.job import Job, shell_line
from megatron_mmrl.cluster.stop import EXIT_REQUEUE
from megatron_mmrl.config import ConfigError
from megatron_mmrl.config.cluster import SlurmConfig

SCRIPT = "launch.slurm"

_SCRIPT = """\
#!/bin/bash
# Made by mmrl launch slurm. Submit it from the directory that its relative paths start in:
#   mkdir -p @LOGS@ && sbatch SCRIPT [key=value ...]
#   scancel --signal=USR1 --batch JOB   saves at the end of the step and queues the job again
#   scancel JOB                         ends it; submitted again, it goes on from the last checkpoint
# shellcheck disable=SC2016,SC2317  # $ in single quotes is meant; a trap calls the function
@OPTIONS@
set -eo pipefail
@SETUP@set -u

attempt=${SLURM_RESTART_COUNT:-0}
log_dir=@LOGS@/attempt_$attempt
mkdir -p "$log_dir"
rm -f "$log_dir/exit"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
echo "job $SLURM_JOB_ID, attempt $attempt on ${hosts[*]}; output: $log_dir/job.log"

# A task that exits badly ends all, and srun knows only the highest code of them. So the first writes down its own,
# and one that has saved as asked exits with 0.
# SIGUSR1 is ignored until the task listens for it: the shell below repeats it.
run=(
@RUN@
)

asked=0
step=
asker=
ask_to_save() {
    interrupted=1
    if ((asked)); then return 0; fi
    asked=1
    echo "asked to stop: saving at the end of this step"
    if [[ -n $step ]]; then repeat_request; fi
}
repeat_request() {
    while kill -USR1 "$step" 2>/dev/null; do sleep 10; done &
    asker=$!
}
trap ask_to_save USR1 TERM

"${run[@]}" >>"$log_dir/job.log" 2>&1 &
step=$!
if ((asked)); then repeat_request; fi
while :; do # a signal ends wait, not srun
    interrupted=0
    code=0
    wait "$step" || code=$?
    if ((!interrupted)) || ! kill -0 "$step" 2>/dev/null; then break; fi
done
trap '' USR1 TERM
if ((interrupted)); then # srun ended at that moment; bash has its code, or has lost it
    code=0
    wait "$step" || code=$?
fi
if ((code < 0)); then code=1; fi
if [[ -n $asker ]]; then kill "$asker" 2>/dev/null || true; fi
if [[ -s $log_dir/exit ]]; then code=$(<"$log_dir/exit"); fi

if ((code == @REQUEUE@)); then
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
    if [[ $state != RUNNING ]]; then # scancel, too, gives the tasks some seconds
        echo "saved; not queued again: the job is ${state:-gone}"
    elif ((attempt < @MAX@)); then
        echo "saved as asked; queued again, $((attempt + 1)) of at most @MAX@ times"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "saved as asked; not queued again: cluster.slurm.max_requeues=@MAX@"
    fi
elif ((code != 0)); then
    echo "exit code $code; output: $log_dir/job.log"
    grep '^error: ' "$log_dir/job.log" | tail -n 1 || true
fi
exit "$code"
"""


def render(job: Job, python: str) -> str:
    """The batch script of ``job``. Relative paths stay so.

    Args:
        job: checked.
        python: the tasks' interpreter, unless the configuration names one.

    Raises:
        ConfigError: Slurm cannot write its log to run.output_dir.
    """
    slurm = job.config.cluster.slurm
    if slurm.python is None and slurm.container_image is not None:
        python = "python"
    values = {
        "LOGS": shlex.quote(_logs(job)),
        "OPTIONS": "".join(f"#SBATCH {option}\n" for option in _options(job)),
        "SETUP": "".join(f"{line}\n" for line in slurm.setup),
        "RUN": "\n".join(f"    {line}" for line in _command(job, slurm.python or python)),
        "REQUEUE": str(EXIT_REQUEUE),
        "MAX": str(slurm.max_requeues),
    }
    return re.sub("@([A-Z]+)@", lambda name: values[name[1]], _SCRIPT)


def _logs(job: Job) -> str:
    return f"{job.config.run.output_dir}/{LOG_DIR}"


def _options(job: Job) -> Iterator[str]:
    slurm = job.config.cluster.slurm
    named = {
        "job-name": slurm.job_name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time_limit,
    }
    yield from (f"--{name}={shlex.quote(value)}" for name, value in named.items() if value is not None)
    yield f"--nodes={job.topology.num_nodes}"
    yield "--ntasks-per-node=1"
    yield from _resources(slurm, job.topology.ranks_per_node)
    yield f"--signal=B:USR1@{slurm.signal_before_end_s}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={shlex.quote(_file_pattern(_logs(job)) + '/slurm-%j.log')}"
    yield from slurm.extra_options


def _resources(slurm: SlurmConfig, ranks_per_node: int) -> Iterator[str]:
    if slurm.gpus_option:
        yield f"{slurm.gpus_option}{':' if '=' in slurm.gpus_option else '='}{ranks_per_node}"
    if slurm.cpus_per_node is not None:
        yield f"--cpus-per-task={slurm.cpus_per_node}"
    else:
        yield "--exclusive"
        yield "--mem=0"


def _file_pattern(path: str) -> str:
    """``path`` for an option of Slurm in whose value % begins a replacement."""
    if "\\" in path or any(not character.isprintable() for character in path):
        raise ConfigError(f"run.output_dir={path!r}: Slurm takes no file name with a backslash or a control character")
    return path.replace("%", "%%")


def _command(job: Job, python: str) -> Iterator[str]:
    """Words of the command that starts all nodes, quoted, some to a line."""
    slurm, topology = job.config.cluster.slurm, job.topology
    yield "srun --kill-on-bad-exit=1 --export=ALL"
    yield f"--nodes={topology.num_nodes} --ntasks={topology.num_nodes} --ntasks-per-node=1"
    # A task may use all that the job has on its node: Slurm would bind it to one core.
    yield "--cpu-bind=none" + (f" --cpus-per-task={slurm.cpus_per_node}" if slurm.cpus_per_node is not None else "")
    if slurm.container_image is not None:
        mounts = "".join(f",{mount}" for mount in slurm.container_mounts)
        yield shell_line([f"--container-image={slurm.container_image}"])
        yield f'--container-mounts="$PWD:$PWD"{shlex.quote(mounts) if mounts else ""} --container-workdir="$PWD"'
    yield """sh -c 'trap "" USR1; exec "$@" --node "$SLURM_NODEID"' task"""
    yield shell_line([python, "-m", "megatron_mmrl.cli", "launch", "torchrun"])
    yield shell_line(["--config", str(job.config_file)])
    yield f"--nodes {topology.num_nodes} --gpus-per-node {topology.ranks_per_node}"
    yield from (shell_line([override]) for override in job.overrides)
    yield '"$@" run.resume=auto'
    yield '--master-addr "${hosts[0]}" --log-dir "$log_dir" --exit-file "$log_dir/exit"'
