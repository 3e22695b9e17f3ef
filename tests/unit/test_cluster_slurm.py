"""The batch script: the same for the same input, understood by bash as it was meant, whatever the names in it are."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_mmrl.cluster.job import Job
from megatron_mmrl.cluster.plan import topology_of
from megatron_mmrl.cluster.slurm import render
from megatron_mmrl.config import ConfigError, load_config
from tests.e2e.run import CONFIG, REPOSITORY

EXAMPLES: dict[Path, str] = runpy.run_path(str(REPOSITORY / "tools" / "render_slurm_examples.py"))["scripts"]()
AWKWARD = 'it\'s "a" $HOME `x` 100% é @MAX@'
# Stands for srun: says how it was called, one word to a line, and does as it is told.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > called
read -r code < do
case $code in
exit*) exit "${code#exit}" ;;
saved) while [[ $1 != --exit-file ]]; do shift; done; echo 85 > "$2"; exit 0 ;;
first) while [[ $1 != --exit-file ]]; do shift; done; echo 2 > "$2"; echo "error: no data"; echo noise; exit 137 ;;
wait) trap 'echo asked >> asked; trap "" USR1; echo 85 > "$log"; exit 0' USR1
    while [[ $1 != --exit-file ]]; do shift; done; log=$2; touch listening; while :; do sleep 0.05; done ;;
finish*) trap 'sleep 1; exit "${code#finish}"' USR1; touch listening; while :; do sleep 0.05; done ;;
esac
"""


def job_of(*overrides: str, nodes: int = 2, config: str = "some config.yaml") -> Job:
    given = ("parallel.data_parallel_size=2", *overrides)
    loaded = load_config(CONFIG, given)
    return Job(config_file=Path(config), overrides=given, config=loaded, topology=topology_of(loaded, nodes))


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def run(script: str, directory: Path, do: str, **variables: str) -> tuple[int, list[str]]:
    """Run the script where ``srun`` and ``scontrol`` are stand-ins; its exit code and what it printed."""
    process = start(script, directory, do, **variables)
    out, errors = process.communicate(timeout=60)
    assert errors == ""
    return process.returncode, out.splitlines()


def start(script: str, directory: Path, do: str, **variables: str) -> subprocess.Popen[str]:
    tools = directory / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text("#!/bin/sh\n[ $1 = show ] && printf 'n1\\nn2\\n' || echo scontrol $*\n")
    (tools / "squeue").write_text(f"#!/bin/sh\ncat '{directory}/state' 2>/dev/null || echo RUNNING\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (directory / "do").write_text(do)
    (directory / "script").write_text(script)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", "script", "optim.lr=a b"], cwd=directory, env=env | variables, stdout=pipe, stderr=pipe, text=True
    )


def test_the_same_job_gives_the_same_script() -> None:
    script = render(job_of(), "python")
    assert script == render(job_of(), "python")
    assert options(script) == [
        "--job-name=mmrl", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--exclusive", "--mem=0",
        "--signal=B:USR1@300", "--requeue", "--open-mode=append", "--output=runs/quickstart/logs/slurm-%j.log",
    ]  # fmt: skip
    assert str(REPOSITORY) not in script


def test_options_come_from_the_configuration() -> None:
    keys = {
        "job_name": "a job", "partition": "gpu", "account": "lab", "qos": "high", "time_limit": "1-12:00:00",
        "signal_before_end_s": 600, "cpus_per_node": 96, "gpus_option": "--gres=gpu", "extra_options": "[--mem=500G]",
    }  # fmt: skip
    script = render(job_of(*(f"cluster.slurm.{key}={value}" for key, value in keys.items())), "python")
    assert options(script) == [
        "--job-name='a job'", "--partition=gpu", "--account=lab", "--qos=high", "--time=1-12:00:00", "--nodes=2",
        "--ntasks-per-node=1", "--gres=gpu:2", "--cpus-per-task=96", "--signal=B:USR1@600", "--requeue",
        "--open-mode=append", "--output=runs/quickstart/logs/slurm-%j.log", "--mem=500G",
    ]  # fmt: skip
    assert "    --cpu-bind=none --cpus-per-task=96\n" in script
    assert "gpus" not in "".join(options(render(job_of("cluster.slurm.gpus_option=null"), "python")))


def test_a_task_is_started_with_every_word_as_it_was_given(tmp_path: Path) -> None:
    job = job_of(f"run.output_dir=runs/{AWKWARD}", f"data.image_root={AWKWARD}", config=f"{AWKWARD}.yaml")
    code, out = run(render(job, f"/opt/{AWKWARD}/python"), tmp_path, "exit0", SLURM_RESTART_COUNT="3")
    logs = f"runs/{AWKWARD}/logs/attempt_3"
    assert (code, out) == (0, [f"job 7, attempt 3 on n1 n2; output: {logs}/job.log"])
    assert (tmp_path / logs / "job.log").read_text() == ""
    assert (tmp_path / "called").read_text().splitlines() == [
        "--kill-on-bad-exit=1", "--export=ALL", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none",
        "sh", "-c", 'trap "" USR1; exec "$@" --node "$SLURM_NODEID"', "task",
        f"/opt/{AWKWARD}/python", "-m", "megatron_mmrl.cli", "launch", "torchrun", "--config", f"{AWKWARD}.yaml",
        "--nodes", "2", "--gpus-per-node", "2", "parallel.data_parallel_size=2", f"run.output_dir=runs/{AWKWARD}",
        f"data.image_root={AWKWARD}", "optim.lr=a b", "run.resume=auto",
        "--master-addr", "n1", "--log-dir", logs, "--exit-file", f"{logs}/exit",
    ]  # fmt: skip


def test_a_container_has_the_working_directory_and_its_own_python(tmp_path: Path) -> None:
    slurm = "cluster.slurm."
    job = job_of(f"{slurm}container_image=/images/mm rl.sqsh", f"{slurm}container_mounts=[/data:/data, /a b:/c]")
    assert run(render(job, "/opt/host/python"), tmp_path, "exit0")[0] == 0
    words = (tmp_path / "called").read_text().splitlines()
    assert words[6:9] == [
        "--container-image=/images/mm rl.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/data:/data,/a b:/c",
        f"--container-workdir={tmp_path}",
    ]
    assert words[words.index("task") + 1] == "python"


def test_setup_runs_before_the_tasks_and_may_fail_the_job(tmp_path: Path) -> None:
    job = job_of("cluster.slurm.setup=[export HELLO=1, 'echo \"hello $HELLO $UNSET\"']")
    assert run(render(job, "python"), tmp_path, "exit0")[1][0] == "hello 1 "
    job = job_of("cluster.slurm.setup=['false']")
    assert run(render(job, "python"), tmp_path, "exit0")[0] == 1


@pytest.mark.parametrize(
    ("do", "restarts", "code", "last_line"),
    [
        ("exit0", "0", 0, None),
        ("exit9", "0", 9, "exit code 9; output: runs/quickstart/logs/attempt_0/job.log"),
        ("first", "0", 2, "error: no data"),  # srun's own code is that of a node which Slurm killed
        ("saved", "1", 85, "scontrol requeue 7"),
        ("saved", "2", 85, "saved as asked; not queued again: cluster.slurm.max_requeues=2"),
    ],
)
def test_the_end_of_a_job(do: str, restarts: str, code: int, last_line: str | None, tmp_path: Path) -> None:
    script = render(job_of("cluster.slurm.max_requeues=2"), "python")
    logs = f"runs/quickstart/logs/attempt_{restarts}"
    first = f"job 7, attempt {restarts} on n1 n2; output: {logs}/job.log"
    (tmp_path / logs).mkdir(parents=True)
    (tmp_path / logs / "exit").write_text("85")  # an earlier job's
    got, out = run(script, tmp_path, do, SLURM_RESTART_COUNT=restarts)
    assert (got, out[0], out[-1]) == (code, first, last_line or first)


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_is_passed_on_once_and_the_end_awaited(name: str, tmp_path: Path) -> None:
    process = start(render(job_of(), "python"), tmp_path, "wait")
    while not (tmp_path / "listening").exists():
        assert process.poll() is None
    for _ in range(2):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (85, "")
    assert out.splitlines()[1:] == [
        "asked to stop: saving at the end of this step",
        "saved as asked; queued again, 1 of at most 10 times",
        "scontrol requeue 7",
    ]
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_a_cancelled_job_is_not_queued_again(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("COMPLETING\n")
    code, out = run(render(job_of(), "python"), tmp_path, "saved")
    assert (code, out[-1]) == (85, "saved; not queued again: the job is COMPLETING")


@pytest.mark.parametrize("code", [0, 9])
def test_a_run_that_ends_by_itself_after_it_was_asked_keeps_its_exit_code(code: int, tmp_path: Path) -> None:
    process = start(render(job_of(), "python"), tmp_path, f"finish{code}")
    while not (tmp_path / "listening").exists():
        assert process.poll() is None
    for _ in range(5):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")
    assert "scontrol" not in out


@pytest.mark.parametrize("path", ["a\\b", "a\nb", "a\tb"])
def test_a_path_that_slurm_cannot_write_to_is_refused(path: str) -> None:
    job = job_of()
    given = load_config(CONFIG, ["parallel.data_parallel_size=2"])
    object.__setattr__(given.run, "output_dir", path)
    with pytest.raises(ConfigError, match="Slurm takes no file name with a backslash or a control character"):
        render(Job(config_file=job.config_file, overrides=(), config=given, topology=job.topology), "python")


@pytest.mark.parametrize("key", ["partition", "extra_options", "setup"])
def test_a_line_break_cannot_bring_in_more_options(key: str) -> None:
    value = '"a\\n#SBATCH --uid=0"'
    with pytest.raises(ConfigError, match=f"cluster.slurm.{key}"):
        job_of(f"cluster.slurm.{key}={value if key == 'partition' else f'[{value}]'}")


@pytest.mark.parametrize("path", sorted(EXAMPLES), ids=lambda path: path.parent.name)
def test_the_scripts_of_the_examples_are_what_is_rendered(path: Path) -> None:
    text = EXAMPLES[path]
    assert path.read_text(encoding="utf-8") == text, "run tools/render_slurm_examples.py"
    assert {"--account=ACCOUNT", "--partition=PARTITION"} <= set(options(text))
    assert "/work" not in text
    assert "/home" not in text


def test_every_example_that_trains_has_one() -> None:
    assert len(EXAMPLES) == len(list(REPOSITORY.glob("examples/*/train.sh"))) > 0


@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=["bash", "shellcheck"])
def test_checkers_find_nothing(checker: list[str], tmp_path: Path) -> None:
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    script = tmp_path / "script"
    container = "cluster.slurm.container_image=it's an image"
    for job in (job_of(), job_of(f"run.output_dir={AWKWARD}", container, "cluster.slurm.setup=[module load cuda]")):
        script.write_text(render(job, f"/{AWKWARD}/python"))
        done = subprocess.run([*checker, str(script)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
