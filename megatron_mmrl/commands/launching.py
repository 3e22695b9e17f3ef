"""What the commands that start a run over nodes share: options, the checked job, and the dry run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.commands.ranks import add_config, add_overrides

if TYPE_CHECKING:
    from megatron_mmrl.cluster.job import Job
    from megatron_mmrl.cluster.plan import LaunchPlan
    from megatron_mmrl.config import Config


def add_job(parser: argparse.ArgumentParser) -> None:
    """Accept what describes a job."""
    add_config(parser)
    add_overrides(parser)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="devices (ranks) of each node; default: what the layout needs"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, places of all ranks, and what would be run"
    )


def checked_job(options: argparse.Namespace, *, joins: bool = False) -> Job:
    """The job of a command line, after every check that needs no process.

    Args:
        options: of ``add_job``. A dry run looks at no data, and needs no checkpoint of a model whose sizes are known.
        joins: this is one of several nodes, and another has perhaps begun the run in its output directory.

    Raises:
        ConfigError: for what cannot work.
    """
    from megatron_mmrl.checkpoint.output_dir import claim_output_dir
    from megatron_mmrl.cluster.job import Job
    from megatron_mmrl.cluster.plan import topology_of
    from megatron_mmrl.cluster.preflight import preflight
    from megatron_mmrl.config import load_config

    config = load_config(options.config, options.overrides)
    topology = topology_of(config, options.nodes, options.gpus_per_node)
    if options.dry_run:
        with _with_sizes(config) as sized:
            preflight(sized, need=None)
            if sized is not config:
                print(f"note: model.path={config.model.path} is not here; its sizes are known by name", file=sys.stderr)
    else:
        preflight(config)
    if not joins:
        claim_output_dir(config)
    return Job(config_file=options.config, overrides=tuple(options.overrides), config=config, topology=topology)


def planned(job: Job) -> LaunchPlan:
    """Where every rank and engine of the job would be.

    Raises:
        ConfigError: trainer and engines do not fit together on these nodes.
    """
    from megatron_mmrl.cluster.plan import own_devices, plan_launch
    from megatron_mmrl.config import ConfigError
    from megatron_mmrl.reshard.between import planner_of

    engine_ranks = own_devices(job.config)
    if job.config.reshard.method == "in_place":
        try:
            with _with_sizes(job.config) as sized:
                engine_ranks = planner_of(sized, job.topology.ranks_per_node).devices
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return plan_launch(job.config, job.topology, engine_ranks)


@contextmanager
def _with_sizes(config: Config) -> Iterator[Config]:
    """``config`` with a model.path that has a config.json, that of a known model of the same name if need be."""
    from megatron_mmrl.models.known import config_dir, known_model

    known = None if (Path(config.model.path) / "config.json").is_file() else known_model(config.model.path)
    if known is None:
        yield config
        return
    with config_dir(known) as directory:
        yield replace(config, model=replace(config.model, path=str(directory)))
