"""``mmrl launch ray``: a run on the nodes of a Ray cluster."""

from __future__ import annotations

import argparse
import os

from megatron_mmrl.commands.launching import add_job, checked_job, planned

SUMMARY = "train on the nodes of a Ray cluster"
DESCRIPTION = """\
Reserves the nodes, starts their ranks, shows rank 0's output and waits. To be
started on a node of the cluster, from a directory that all nodes see.
SIGTERM or SIGUSR1 saves at the end of the step and ends with exit code 85:
start it again with run.resume=auto. A lost node ends the run by name, or with
--max-restarts starts it again from the newest checkpoint.

  mmrl launch ray --config F --nodes 2 --dry-run
  mmrl launch ray --config F --nodes 2 --gpus-per-node 8 --max-restarts 3
  mmrl launch ray --config F --nodes 2 --cpus-per-rank 4 --reward-cpus 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    parser.add_argument("--address", default="auto", metavar="A", help="HOST:PORT of the cluster; default: RAY_ADDRESS")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="K", help="start again so often after a failure")
    parser.add_argument(
        "--cpus-per-rank", type=int, metavar="C", help="reserve C CPUs and no GPU for each rank: they run on the CPU"
    )
    parser.add_argument(
        "--reward-cpus", type=int, default=0, metavar="R", help="score on R CPUs of the cluster that no rank needs, too"
    )
    parser.add_argument(
        "--pass-env", action="append", default=[], metavar="NAME", help="give the ranks this variable; may be repeated"
    )
    parser.add_argument(
        "--allow-open-cluster", action="store_true", help="use a cluster that asks for no token; see docs/ray.md"
    )


def run(options: argparse.Namespace) -> int:
    """Start, or with --dry-run print. Raises ConfigError for what cannot work."""
    from megatron_mmrl.cluster.describe import describe
    from megatron_mmrl.cluster.ray_plan import Service, demand_of, describe_launch, passed_on
    from megatron_mmrl.rewards.remote import ENDPOINTS, KEY

    _check(options)
    job = checked_job(options)
    plan = planned(job)
    demand = demand_of(job.topology.ranks_per_node, options.cpus_per_rank)
    environment = passed_on(os.environ, options.pass_env)
    service = None
    if options.reward_cpus:
        module = "megatron_mmrl.rewards.remote_server"
        service = Service(module=module, cpus=options.reward_cpus, endpoints=ENDPOINTS, key=KEY)
    if options.dry_run:
        print(describe(job.config, plan))
        print(describe_launch(job, demand, environment, os.getcwd(), service), end="")
        return 0

    from megatron_mmrl.cluster.ray import RayRun, run_on_ray
    from megatron_mmrl.cluster.ray_access import connect

    connect(options.address, allow_open=options.allow_open_cluster)
    return run_on_ray(
        RayRun(job=job, demand=demand, environment=environment, service=service, max_restarts=options.max_restarts)
    )


def _check(options: argparse.Namespace) -> None:
    from megatron_mmrl.config import ConfigError

    if options.cpus_per_rank is not None and options.cpus_per_rank < 1:
        raise ConfigError(f"--cpus-per-rank {options.cpus_per_rank}: use 1 or more, or leave it out to run on GPUs")
    for name in ("max_restarts", "reward_cpus"):
        if getattr(options, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: use 0 or more")
    for name in options.pass_env:
        if name not in os.environ:
            raise ConfigError(f"--pass-env {name}: there is no such variable here")
