"""``mmrl launch slurm`` on a real Slurm of two nodes: what comes out, and how jobs are stopped, continued and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.run import CONFIG, SMALL, TWO_RANKS, Run, environment, untimed
from tests.slurm.cluster import Slurm, missing_programs, running_slurm

pytestmark = [
    pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed: no {', '.join(missing_programs())}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm of one's own needs root"),
    pytest.mark.timeout(900),  # whole runs, one after the other
]
AWKWARD = 'it\'s "a" $HOME 100% é'
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A submitted run."""

    slurm: Slurm
    number: int
    path: Path  # its output directory

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    @property
    def log(self) -> str:
        """What the batch script printed, in all attempts."""
        return (self.path / "logs" / f"slurm-{self.number}.log").read_text()

    def num_rows(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait_until(self, condition: Callable[[], object], *, over: bool = False) -> None:
        """Fails the test when it takes too long, or the job is over though ``over`` was not waited for."""
        deadline = time.monotonic() + 400
        while not condition():
            state = self.state
            assert time.monotonic() < deadline, self.story()
            assert over or state not in OVER, f"{state}\n{self.story()}"
            time.sleep(0.1)

    def finish(self) -> str:
        """Wait for the end; Slurm's state and exit code."""
        self.wait_until(lambda: self.state in OVER, over=True)
        return f"{self.state} {self.slurm.job(self.number)['ExitCode']}"

    def story(self) -> str:
        """All that was logged."""
        logs = sorted((self.path / "logs").rglob("*.log"))
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm"), nodes=2) as cluster:
        yield cluster


@pytest.fixture
def submit(slurm: Slurm, work_dir: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Submit the small run of two ranks, one to a node; what is not over at the end of the test is cancelled."""
    jobs: list[Job] = []

    def submit(*overrides: str) -> Job:
        path = work_dir / "runs" / f"{request.node.name} {AWKWARD}"
        config = work_dir / f"{AWKWARD}.yaml"
        shutil.copy(CONFIG, config)
        settings = (f"run.output_dir={path.relative_to(work_dir)}", "cluster.slurm.gpus_option=null", *overrides)
        done = launch(slurm, work_dir, config.name, *SMALL, *TWO_RANKS, *settings)
        assert done.returncode == 0, done.stderr
        number = int(done.stdout.split()[1].rstrip(":"))
        assert f"scancel --signal=USR1 --batch {number}" in done.stdout
        jobs.append(Job(slurm=slurm, number=number, path=path))
        return jobs[-1]

    yield submit
    for job in jobs:
        if job.state not in OVER:
            slurm.run("scancel", str(job.number))


def launch(slurm: Slurm, work_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``mmrl launch slurm`` on two nodes, in ``work_dir``; the first of ``words`` is the configuration."""
    command = [sys.executable, "-m", "megatron_mmrl.cli", "launch", "slurm", "--nodes", "2", "--config", *words]
    env = environment() | slurm.environment
    return subprocess.run(command, cwd=work_dir, env=env, capture_output=True, text=True, timeout=100, check=False)


def ask_to_save(job: Job) -> None:
    job.slurm.run("scancel", "--signal=USR1", "--batch", str(job.number))


def test_a_job_that_is_asked_to_save_goes_on_by_itself_to_the_same_end(
    submit: Callable[..., Job], two_rank_run: Run
) -> None:
    job = submit()
    job.wait_until(lambda: job.num_rows() >= 2)  # step 1 is done
    ask_to_save(job)
    job.wait_until(lambda: job.state == "PENDING")
    assert "saved as asked; queued again, 1 of at most 10 times" in job.log
    done = job.num_rows() - 1
    assert 1 <= done < 3
    assert (job.path / "checkpoints" / f"step_{done}").is_dir()
    assert not (job.path / "hf").exists()
    assert job.finish() == "COMPLETED 0:0", job.story()
    assert f"continuing after step {done} of 3" in (job.path / "logs" / "attempt_1" / "job.log").read_text()
    run = Run(path=job.path, output="")
    assert untimed(run.rows) == untimed(two_rank_run.rows)
    assert [run.completions(step) for step in (1, 2, 3)] == [two_rank_run.completions(step) for step in (1, 2, 3)]


def test_a_refused_configuration_ends_the_job(submit: Callable[..., Job], work_dir: Path) -> None:
    gone = work_dir / "gone.parquet"
    shutil.copy(work_dir / "runs" / "prepared" / "train.parquet", gone)
    job = submit(f"data.train_files=[{gone}]", "cluster.slurm.extra_options=[--hold]")
    gone.unlink()  # while the job waits in the queue
    job.slurm.run("scontrol", "release", str(job.number))
    assert job.finish() == "FAILED 2:0", job.story()
    assert job.log.splitlines()[-1] == f"error: data.train_files: {gone} does not exist"
    assert job.slurm.job(job.number)["Restarts"] == "0"


def test_a_killed_rank_ends_all_nodes_and_is_named(submit: Callable[..., Job]) -> None:
    job = submit()
    ranks: dict[str, psutil.Process] = {}
    job.wait_until(lambda: ranks.update(running_ranks(job)) or len(ranks) == 2)
    job.wait_until(lambda: (job.path / "logs" / "attempt_0" / "engine1.log").exists())  # the ranks have met
    ranks["1"].send_signal(signal.SIGKILL)
    assert job.finish() == "FAILED 1:0", job.story()
    assert job.log.splitlines()[-1] == "error: rank 1: killed by SIGKILL"
    assert not running_ranks(job)


@pytest.mark.full
def test_a_request_that_comes_at_once_is_kept_and_a_job_that_may_not_be_requeued_says_so(
    submit: Callable[..., Job],
) -> None:
    job = submit("cluster.slurm.max_requeues=0")
    job.wait_until(lambda: (job.path / "logs" / "attempt_0" / "job.log").exists())
    ask_to_save(job)
    assert job.finish() == "FAILED 85:0", job.story()
    assert job.log.splitlines()[-1] == "saved as asked; not queued again: cluster.slurm.max_requeues=0"
    assert "stopped as asked after step 0 of 3" in (job.path / "logs" / "attempt_0" / "job.log").read_text()


def test_sbatch_refusing_is_a_user_error(slurm: Slurm, work_dir: Path) -> None:
    settings = ("run.output_dir=runs/refused", "cluster.slurm.partition=none", "cluster.slurm.gpus_option=null")
    done = launch(slurm, work_dir, str(CONFIG), *TWO_RANKS, *settings)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch refuses runs/refused/logs/launch.slurm: ")
    assert "invalid partition specified: none" in done.stderr


def running_ranks(job: Job) -> dict[str, psutil.Process]:
    """The job's ranks on this machine, by RANK."""
    found = {}
    for process in psutil.process_iter():
        try:
            if {f"run.output_dir=runs/{job.path.name}", "megatron_mmrl.train"} <= set(process.cmdline()):
                environ = process.environ()
                if "LOCAL_RANK" in environ:
                    found[environ["RANK"]] = process
        except psutil.Error:  # it ended while it was looked at
            continue
    return found
