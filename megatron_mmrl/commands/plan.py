"""``mmrl plan``: what a run needs of each GPU, whether that fits, and the nearest layout that does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.commands.ranks import add_config, add_overrides
from megatron_mmrl.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from megatron_mmrl.memory.estimate import Estimate, Machine

SUMMARY = "memory that a run needs of each GPU, and layouts that fit"
DESCRIPTION = """\
Estimates what a configuration needs of each GPU at its start, in training and
in rollout, by part; says whether it fits, and proposes the nearest layout that
does. Needs no GPU and no weights: of model.path only config.json is read, and
where there is none, a name such as Qwen2.5-VL-7B-Instruct is enough.
Exit code 0 when it fits, 1 when not, 2 for input that cannot be used.

  mmrl plan --config configs/qwen2_5_vl_32b.yaml --gpus 64 --gpu-memory 80
  mmrl plan --config configs/qwen2_5_vl_7b.yaml --gpus 8 --gpu-memory 141 model.recompute=full
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_overrides(parser)
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs of the whole job")
    parser.add_argument(
        "--gpu-memory", required=True, type=float, metavar="G", help="of one GPU, as in its name: 80, 141"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of one node (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, in place of tables")


def run(options: argparse.Namespace) -> int:
    """Print the plan. Returns 0 when it fits, else 1.

    Raises:
        ConfigError: a configuration, model or machine that cannot be used.
    """
    from megatron_mmrl.memory.report import as_json, layout_line, proposal_lines, show, verdict
    from megatron_mmrl.memory.search import nearest, problems

    config = load_config(options.config, options.overrides)
    machine = _machine(options)
    with _with_sizes(config) as sized:
        plan, refusal = _estimate(sized, machine)
        fits = plan is not None and not problems(sized, plan)
        near = None if fits else nearest(sized, machine)
        fast = nearest(sized, machine, keep=False) if near else None
    if options.json:
        print(json.dumps(as_json(config, plan, refusal, near=near, fast=fast), indent=2))
        return 0 if fits else 1
    print(f"{config.model.path}, {config.model.dtype}: {layout_line(config)}")
    if plan is not None:
        show(config, plan)
    print(*(verdict(config, plan) if plan is not None else [f"does not fit: {refusal}"]), sep="\n")
    if not fits:
        print(*proposal_lines(near, fast), sep="\n")
        if near is not None:
            show(near.config, near.estimate)
    return 0 if fits else 1


def _machine(options: argparse.Namespace) -> Machine:
    from megatron_mmrl.memory.estimate import Machine

    gpus, per_node = options.gpus, min(options.gpus, options.gpus_per_node)
    if gpus < 1 or per_node < 1 or gpus % per_node:
        raise ConfigError(f"--gpus {gpus} is no multiple of --gpus-per-node {options.gpus_per_node}; give whole nodes")
    if not options.gpu_memory > 0:
        raise ConfigError(f"--gpu-memory {options.gpu_memory:g}: give the GB in the GPU's name, such as 80")
    return Machine(gpus=gpus, gpus_per_node=per_node, gpu_memory_gib=options.gpu_memory)


@contextmanager
def _with_sizes(config: Config) -> Iterator[Config]:
    """``config`` with a ``model.path`` that has a ``config.json``."""
    from megatron_mmrl.models.known import MODELS_DIR, config_dir, known_model

    path = config.model.path
    name = path if (Path(path) / "config.json").is_file() else known_model(path)
    if name is None:
        known = ", ".join(sorted(file.stem for file in MODELS_DIR.glob("*.yaml")))
        raise ConfigError(f"model.path={path} has no config.json, and is not named after one of {known}")
    with config_dir(name) as directory:
        sized = replace(config, model=replace(config.model, path=str(directory)))
        _check_model(sized, path)
        yield sized


def _check_model(config: Config, named: str) -> None:
    """Refuse what no layout can help; ``named``: what the user calls the model."""
    from megatron_mmrl.memory.model import model_sizes
    from megatron_mmrl.memory.parameters import total_parameters
    from megatron_mmrl.models.registry import read_hf_config

    try:
        model_sizes(read_hf_config(config.model.path))
        total_parameters(config.model)
    except KeyError as error:
        raise ConfigError(f"model.path={named}: config.json has no {error.args[0]}") from error
    except ValueError as error:  # model.freeze
        raise ConfigError(str(error)) from error


def _estimate(config: Config, machine: Machine) -> tuple[Estimate | None, str | None]:
    """The estimate, or why there is none."""
    from megatron_mmrl.memory.estimate import estimate

    if config.parallel.world_size != machine.gpus:
        return None, (
            f"the configuration's parallel sizes make {config.parallel.world_size} GPUs, not --gpus {machine.gpus}"
        )
    try:
        return estimate(config, machine), None
    except ValueError as error:
        return None, str(error)
