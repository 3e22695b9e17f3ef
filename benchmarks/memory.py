"""The memory estimate beside what a run of the tiny model takes on this machine's CPU, part by part.

    python -m benchmarks.memory [--cases NAME ...] [--json FILE]

Every rank of every case is a real policy that makes two updates (``memory_measure.py``). Exit code 1 when a rank's
total is off by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.memory_measure import Case, Measured, measure
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.memory.activations import stage_activations
from megatron_mmrl.memory.model import ITEM_BYTES, model_sizes
from megatron_mmrl.memory.parameters import parameter_bytes, stage_parameters
from megatron_mmrl.memory.workload import setting_of, worst_workload
from megatron_mmrl.models.registry import read_hf_config
from megatron_mmrl.parallel.layout import ParallelLayout

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TOLERANCE = 0.1
_TENSOR, _PIPELINE = "parallel.tensor_model_parallel_size=", "parallel.pipeline_model_parallel_size="
_DATA, _CONTEXT = "parallel.data_parallel_size=", "parallel.context_parallel_size="
_FROZEN, _BF16 = "model.freeze=[vision,merger]", "model.dtype=bfloat16"
CASES = (
    Case(name="one rank", overrides=(_TENSOR + "1",), lengths=(512,) * 4),
    Case(name="one rank, merger trained", overrides=(_TENSOR + "1", "model.freeze=[vision]"),
         lengths=(700, 300, 90, 1000, 222, 512, 512)),
    Case(name="bfloat16, reference", overrides=(_TENSOR + "1", _BF16, "algorithm.kl_coef=0.1"), lengths=(512,) * 4),
    Case(name="selective", overrides=(_TENSOR + "1", "model.recompute=selective", _FROZEN), lengths=(512,) * 8),
    Case(name="tensor 2, sequence parallel", overrides=(_TENSOR + "2", _BF16, _FROZEN), lengths=(400, 800, 640, 200)),
    Case(name="tensor 2, plain", overrides=(_TENSOR + "2", "parallel.sequence_parallel=false"), lengths=(512,) * 4),
    Case(name="pipeline 2", lengths=(512,) * 8,
         overrides=(_TENSOR + "1", _PIPELINE + "2", "trainer.micro_batch_tokens=1024")),
    Case(name="pipeline 2 x 2 chunks", lengths=(512,) * 8,
         overrides=(_TENSOR + "1", _PIPELINE + "2", "parallel.virtual_pipeline_model_parallel_size=2", _FROZEN,
                    "trainer.micro_batch_tokens=1024")),
    Case(name="data 2, full recompute", lengths=(512,) * 8,
         overrides=(_TENSOR + "1", _DATA + "2", "model.recompute=full")),
    Case(name="data 2, plain optimizer", lengths=(300,) * 8,
         overrides=(_TENSOR + "1", _DATA + "2", _BF16, _FROZEN, "parallel.use_distributed_optimizer=false")),
    Case(name="context 2", overrides=(_TENSOR + "1", _CONTEXT + "2", _FROZEN), lengths=(512,) * 8),
    Case(name="tensor 2 x context 2", overrides=(_TENSOR + "2", _CONTEXT + "2", _BF16), lengths=(256,) * 8),
    Case(name="pipeline 4", overrides=(_TENSOR + "1", _PIPELINE + "4", _BF16, "trainer.micro_batch_tokens=1024"),
         lengths=(256,) * 32),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One rank, bytes by part."""

    case: str
    rank: int
    estimated: dict[str, int]
    measured: dict[str, int]

    @property
    def ratio(self) -> float:
        """Estimated over measured, of all parts together."""
        return sum(self.estimated.values()) / sum(self.measured.values())


def config_of(case: Case, model_path: Path) -> Config:
    """The quickstart's configuration in the layout of a case."""
    return load_config(QUICKSTART, [f"model.path={model_path}", *case.overrides])


def compare(case: Case, config: Config, rank: int, measured: Measured) -> Comparison:
    """The estimate for what the rank had to do, beside what that took."""
    layout = ParallelLayout.from_config(config.parallel)
    stage = layout.coordinates(rank).pipeline
    model = model_sizes(read_hf_config(config.model.path))
    load = replace(
        worst_workload(config, model),
        tokens=measured.tokens,
        loss_tokens=measured.loss_tokens,
        patches=measured.patches // (layout.tensor * layout.context),
        patches_of_image=case.image_side**2,
        microbatches=measured.microbatches,
        span=sum(length**2 for length in case.lengths) // sum(case.lengths),
    )
    activations = stage_activations(model, setting_of(config, "torch"), load, stage)
    held = stage_parameters(config.model, config.parallel)[stage]
    ranks, distributed = layout.data * layout.context, config.parallel.use_distributed_optimizer
    sizes = parameter_bytes(held, config.model.dtype, ranks, distributed=distributed)
    kept = ITEM_BYTES[config.model.dtype] * held.elements
    return Comparison(
        case=case.name,
        rank=rank,
        estimated={
            "weights": kept,  # the bytes of the parameters alone, as they are counted
            "gradients": sizes.gradients,
            "optimizer": sizes.optimizer,
            "reference": kept if config.algorithm.kl_coef > 0 else 0,
            "activations": activations.total,
        },
        measured={
            name: getattr(measured, name) for name in ("weights", "gradients", "optimizer", "reference", "activations")
        },
    )


def main() -> int:
    """Print the table."""
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args()
    rows: list[Comparison] = []
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_checkpoint(Path(directory))
        for case in (case for case in CASES if case.name in options.cases):
            config = config_of(case, Path(directory))
            rows += [compare(case, config, rank, one) for rank, one in enumerate(_on_ranks(config, case))]
            _print(rows[-case.world_size :])
    if options.json:
        options.json.write_text(json.dumps([_plain(row) for row in rows], indent=2))
    return int(any(abs(row.ratio - 1) > TOLERANCE for row in rows))


def _print(rows: Sequence[Comparison]) -> None:
    for row in rows:
        parts = "  ".join(f"{name} {row.estimated[name]:,} / {size:,}" for name, size in row.measured.items() if size)
        print(f"{row.case:<28} rank {row.rank}  {row.ratio:.3f}  {parts}", flush=True)


def _plain(row: Comparison) -> dict[str, Any]:
    return {
        "case": row.case, "rank": row.rank, "ratio": row.ratio, "estimated": row.estimated, "measured": row.measured
    }  # fmt: skip


def _on_ranks(config: Config, case: Case) -> list[Measured]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_mmrl.trainer.policy"])
    with ProcessPoolExecutor(case.world_size, context) as pool:
        ranks = [pool.submit(_rank, rank, port, config, case) for rank in range(case.world_size)]
        return [rank.result() for rank in ranks]


def _rank(rank: int, port: int, config: Config, case: Case) -> Measured:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.world_size), "MASTER_ADDR": "127.0.0.1",
        "LOCAL_WORLD_SIZE": str(case.world_size), "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return measure(config, case)


if __name__ == "__main__":
    sys.exit(main())
