"""The tables of layouts in ``configs/qwen2_5_vl_*.yaml``: making them, and reading them back.

    python -m benchmarks.memory_layouts [FILE ...]      writes the table anew into these configurations (default: all)

For each number and size of GPUs it holds the fitting layout of the lowest cost (``memory/search.py``), and what the
estimator says of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mmrl.config import Config, load_config
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.memory.estimate import GIB, Estimate, Machine
from megatron_mmrl.memory.report import total
from megatron_mmrl.memory.search import Proposal, nearest
from megatron_mmrl.models.known import config_dir, known_model

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("qwen2_5_vl_*.yaml"))
MACHINES = [(gpus, memory) for memory in (80, 141) for gpus in (8, 16, 32, 64, 128)]
_BEGIN, _END = "# <layouts>\n", "# </layouts>\n"
_COLUMNS = ("GPUs", "GB", "tensor", "pipeline", "chunks", "context", "data", "engine", "share", "recompute",
            "start", "training", "rollout", "host")  # fmt: skip
_KEYS = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.data_parallel_size",
    "rollout.tensor_parallel_size",
    "rollout.mem_fraction_static",
    "model.recompute",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table."""

    gpus: int
    memory: int
    overrides: tuple[str, ...]
    """Empty where nothing fits."""
    gib: tuple[str, ...]
    """Start, training, rollout, and host of a node, as they are printed."""


@contextmanager
def sized(file: Path) -> Iterator[Config]:
    """A configuration whose ``model.path`` has the sizes of the model that it names."""
    config = load_config(file)
    name = known_model(config.model.path)
    if name is None:
        raise ValueError(f"{file}: model.path={config.model.path} is not named after a known model")
    with config_dir(name) as directory:
        yield replace(config, model=replace(config.model, path=str(directory)))


def machine(gpus: int, memory: int) -> Machine:
    """Nodes of 8."""
    return Machine(gpus=gpus, gpus_per_node=8, gpu_memory_gib=memory)


def printed(plan: Estimate) -> tuple[str, ...]:
    """GiB of the GPU that needs most in each phase, and of a node's host."""
    phases = [max(total(stage, phase) for stage in plan.stages) for phase in ("start", "training", "rollout")]
    return (*(f"{size / GIB:.1f}" for size in phases), f"{plan.host.total / GIB:.0f}")


def parse(text: str) -> list[Row]:
    """The rows of the table in a configuration's comments."""
    table = text.split(_BEGIN)[1].split(_END)[0]
    rows = []
    for line in table.splitlines()[1:]:
        cells = line.strip("# ").split()
        if len(cells) < len(_COLUMNS):
            rows.append(Row(gpus=int(cells[0]), memory=int(cells[1]), overrides=(), gib=()))
            continue
        values = ["null" if cell == "-" else cell for cell in cells[2:10]]
        engines = int(cells[0]) // int(values[5])
        settings = [f"{key}={value}" for key, value in zip(_KEYS, values, strict=True)]
        rows.append(
            Row(
                gpus=int(cells[0]),
                memory=int(cells[1]),
                overrides=(*settings, f"rollout.num_engines={engines}"),
                gib=tuple(cells[10:]),
            )
        )
    return rows


def _write(file: Path) -> None:
    with sized(file) as config:
        # Not from the recipe's own share and recomputation, which are those of one row.
        rollout = replace(config.rollout, mem_fraction_static=RolloutConfig().mem_fraction_static)
        config = replace(config, rollout=rollout, model=replace(config.model, recompute="none"))
        found = [(at, nearest(config, machine(*at), keep=False)) for at in MACHINES]
    lines = [_line(_COLUMNS), *(_line(_cells(at, proposal)) for at, proposal in found)]
    text = file.read_text(encoding="utf-8")
    table = re.compile(f"{_BEGIN}.*{_END}", re.DOTALL)
    file.write_text(table.sub("".join([_BEGIN, *lines, _END]), text), encoding="utf-8")


def _cells(at: tuple[int, int], proposal: Proposal | None) -> Sequence[str]:
    if proposal is None:
        return (*map(str, at), "nothing", "fits")
    parallel, config = proposal.config.parallel, proposal.config
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or "-",
        parallel.context_parallel_size,
        parallel.data_parallel_size,
        config.rollout.tensor_parallel_size,
        config.rollout.mem_fraction_static,
        config.model.recompute,
    )
    return (*map(str, at), *map(str, sizes), *printed(proposal.estimate))


def _line(cells: Sequence[str]) -> str:
    return "# " + " ".join(cell.rjust(max(4, len(name))) for cell, name in zip(cells, _COLUMNS, strict=False)) + "\n"


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or CONFIGS:
        _write(path)
