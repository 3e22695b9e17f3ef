"""docs/multinode.md names what exists: torchrun's options, configuration keys, phases, torch's variables."""

from __future__ import annotations

import operator
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch.distributed.run import get_args_parser

from megatron_mmrl import cli, train
from megatron_mmrl.cluster.plan import topology_of
from megatron_mmrl.config import Config, load_config
from tests.unit.test_repo import commands

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "multinode.md"
TEXT = PAGE.read_text(encoding="utf-8")


def keys(cls: type, prefix: str = "") -> set[str]:
    """``run.seed``, ``cluster.slurm.qos``, ...: every key of the configuration, groups too."""
    hints = get_type_hints(cls)
    found = {prefix + field.name for field in fields(cls)}
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            found |= keys(hints[field.name], f"{prefix}{field.name}.")
    return found


def test_torchrun_takes_these_options() -> None:
    lines = [shlex.split(line, comments=True) for line in commands(PAGE) if line.startswith("torchrun")]
    assert len(lines) >= 2
    for words in lines:
        options = get_args_parser().parse_args(words[1:])
        assert options.module
        assert (ROOT / (options.training_script.replace(".", "/") + ".py")).is_file()
        config = train.parse(options.training_script_args)
        ranks = int(options.nnodes) * int(options.nproc_per_node)
        assert config.parallel.world_size == ranks


def test_configuration_keys_exist() -> None:
    known = keys(Config)
    groups = "|".join(sorted({key for key in known if "." not in key}))
    named = set(re.findall(rf"`((?:{groups})\.[a-z_.]+)(?:=[^`]*)?`", TEXT))
    assert len(named) > 15
    assert named <= known


def test_timed_phases_exist() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_mmrl").rglob("*.py"))
    (listed,) = re.findall(r"which `time/\*_s` of a row makes up `time/step_s`: (.*?)\.", TEXT, re.S)
    phases = re.findall(r"`([a-z_]+)`", listed)
    assert len(phases) == 6
    assert [phase for phase in phases if f'time("{phase}")' not in sources] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"TORCH_[A-Z_]+", TEXT))))
def test_torch_knows_the_variable(name: str) -> None:
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    headers = (path.read_text(encoding="utf-8") for path in include.rglob("*.hpp"))
    library = (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").read_bytes()
    assert name.encode() in library or any(name in header for header in headers)


def test_launchers_get_the_nodes_that_their_layout_needs() -> None:
    requests = [cli.parse(shlex.split(line, comments=True)[1:]) for line in commands(PAGE) if "mmrl launch" in line]
    assert {request.subcommand for request in requests} == {"torchrun", "slurm", "ray"}
    for request in requests:
        config = load_config(request.config, request.overrides)
        topology = topology_of(config, request.nodes, request.gpus_per_node)
        assert config.rollout.tensor_parallel_size <= topology.ranks_per_node


def test_defaults_are_as_the_page_says() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    told = re.findall(r"`([a-z_.]+)`\s\((\d+)\)", TEXT)
    assert len(told) >= 3
    for key, value in told:
        if "." in key:
            assert str(operator.attrgetter(key)(config)) == value, key


@pytest.mark.parametrize(
    "words",
    [
        "does not divide the",
        "would run on nodes",
        "stands for loopback",
        "cannot be reached",
        "is not one writable directory for all",
        "killed by ",
        "does not answer",
        "already holds a run",
        "holds another run: ",
        "stopped as asked after step",
    ],
)
def test_messages_are_as_the_page_quotes_them(words: str) -> None:
    assert words in TEXT
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "megatron_mmrl").rglob("*.py"))
    assert any(words in source for source in sources)
