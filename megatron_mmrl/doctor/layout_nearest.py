"""Layouts that a model can be cut into, nearest to one that it cannot. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mmrl.config import Config
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.parallel.layout import check_layout

Stages = tuple[int, int | None]  # pipeline size, chunks of a virtual pipeline
_ONE_RANK = ParallelConfig()


def check(hf_config: Mapping[str, Any], parallel: ParallelConfig, engine_tensor: int = 1) -> None:
    """The trainer's own check, for a model and parallel sizes alone. Raises ValueError as ``check_layout`` does."""
    rollout = RolloutConfig(tensor_parallel_size=engine_tensor)
    check_layout(hf_config, Config(model=ModelConfig(path="-"), parallel=parallel, rollout=rollout))


def nearest_layouts(hf_config: Mapping[str, Any], wanted: ParallelConfig, count: int = 3) -> list[ParallelConfig]:
    """``count`` layouts that work, or fewer, nearest first: fewest doublings of all sizes away from ``wanted``.

    The number of replicas is changed along where that keeps the number of ranks.
    """
    text = hf_config.get("text_config") or hf_config
    tensors = range(1, int(text["num_attention_heads"]) + 1)
    stages = _stages(int(text["num_hidden_layers"]), virtual=wanted.virtual_pipeline_model_parallel_size is not None)
    # Tensor and pipeline size are checked one by one first: far fewer checks than pairs.
    pairs = itertools.product(
        [tensor for tensor in tensors if _fits(hf_config, _resized(_ONE_RANK, tensor, (1, None)))],
        [stage for stage in stages if _fits(hf_config, _resized(_ONE_RANK, 1, stage))],
    )
    candidates = sorted(
        (_resized(wanted, tensor, stage) for tensor, stage in pairs), key=lambda layout: _distance(layout, wanted)
    )
    return list(itertools.islice((layout for layout in candidates if _fits(hf_config, layout)), count))


def describe(layout: ParallelConfig) -> str:
    """As options of the command line."""
    virtual = layout.virtual_pipeline_model_parallel_size
    options = {
        "tensor": layout.tensor_model_parallel_size,
        "pipeline": layout.pipeline_model_parallel_size,
        **({"virtual-pipeline": virtual} if virtual else {}),
        **({"context": layout.context_parallel_size} if layout.context_parallel_size > 1 else {}),
        "data": layout.data_parallel_size,
    }
    return f"{' '.join(f'--{name} {size}' for name, size in options.items())} ({layout.world_size} ranks)"


def _stages(layers: int, *, virtual: bool) -> Iterator[Stages]:
    for pipeline in range(1, layers + 1):
        chunks = range(2, layers // pipeline + 1) if virtual and pipeline > 1 else ()
        yield from ((pipeline, size) for size in (None, *chunks))


def _resized(wanted: ParallelConfig, tensor: int, stages: Stages) -> ParallelConfig:
    one = dataclasses.replace(
        wanted,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages[0],
        virtual_pipeline_model_parallel_size=stages[1],
        data_parallel_size=1,
    )
    replicas, rest = divmod(wanted.world_size, one.world_size)
    keeps_ranks = replicas > 0 and rest == 0
    return dataclasses.replace(one, data_parallel_size=replicas if keeps_ranks else wanted.data_parallel_size)


def _fits(hf_config: Mapping[str, Any], layout: ParallelConfig) -> bool:
    try:
        check(hf_config, layout)
    except ValueError:
        return False
    return True


def _distance(layout: ParallelConfig, wanted: ParallelConfig) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(_sizes(layout), _sizes(wanted), strict=True))


def _sizes(layout: ParallelConfig) -> tuple[int, int, int, int]:
    return (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size or 1,
        layout.world_size,
    )
