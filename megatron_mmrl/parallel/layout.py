"""Which rank does which part: sizes, rank <-> coordinates, and whether a model fits. Pure: loads no torch.

Rank order is Megatron's default ``tp-cp-ep-dp-pp``: tensor-parallel neighbours are adjacent ranks, pipeline stages are
farthest apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mmrl.config import Config
from megatron_mmrl.config.checks import require
from megatron_mmrl.config.parallel import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Where a rank stands in each group."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Sizes of the groups; ``virtual_pipeline`` is the number of model chunks per pipeline rank."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1

    @classmethod
    def from_config(cls, parallel: ParallelConfig) -> ParallelLayout:
        return cls(
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            virtual_pipeline=parallel.virtual_pipeline_model_parallel_size or 1,
            context=parallel.context_parallel_size,
            data=parallel.data_parallel_size,
        )

    def __str__(self) -> str:
        chunks = f" of {self.virtual_pipeline} chunks" if self.virtual_pipeline > 1 else ""
        return f"tensor {self.tensor} x pipeline {self.pipeline}{chunks} x context {self.context} x data {self.data}"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.context * self.data * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """Place of ``rank``. Raises ValueError for a rank outside the world."""
        require(0 <= rank < self.world_size, f"rank {rank} is outside the world of {self.world_size} ranks")
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return Coordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def rank(self, at: Coordinates) -> int:
        """The inverse of ``coordinates``. Raises ValueError for a place outside a group."""
        for name in ("tensor", "context", "data", "pipeline"):
            index, size = getattr(at, name), getattr(self, name)
            require(0 <= index < size, f"{name} index {index} is outside the group of size {size}")
        return ((at.pipeline * self.data + at.data) * self.context + at.context) * self.tensor + at.tensor


def check_layout(hf_config: Mapping[str, Any], config: Config) -> None:
    """Refuse a layout that the model cannot be cut into, before anything heavy starts.

    Args:
        hf_config: content of the checkpoint's ``config.json``; text sizes nested under ``text_config`` or flat.
        config: the run's configuration.

    Raises:
        ValueError: names the key, both numbers and the values that would work.
    """
    text = hf_config.get("text_config") or hf_config
    _check_tensor(text, config.parallel.tensor_model_parallel_size)
    _check_pipeline(int(text["num_hidden_layers"]), config.parallel)
    _check_engine(text, hf_config["vision_config"], config.rollout.tensor_parallel_size)


def _check_tensor(text: Mapping[str, Any], tensor: int) -> None:
    heads, groups = int(text["num_attention_heads"]), int(text["num_key_value_heads"])
    intermediate, head_dim = int(text["intermediate_size"]), int(text["hidden_size"]) // heads
    attention_rows = (heads + 2 * groups) * head_dim

    def fits(size: int) -> bool:
        # More ranks than key/value heads share them, evenly, and share out the rows of linear_qkv (Megatron's rules).
        whole = all(number % size == 0 for number in (heads, intermediate, attention_rows))
        return whole and (groups % size == 0 or size % groups == 0)

    require(
        fits(tensor),
        f"parallel.tensor_model_parallel_size={tensor} does not fit the model: it must divide "
        f"num_attention_heads={heads}, intermediate_size={intermediate} and the {attention_rows} rows of queries, keys "
        f"and values, and divide or be a multiple of num_key_value_heads={groups}; "
        f"use one of {[n for n in range(1, heads + 1) if fits(n)]}",
    )


def _check_pipeline(layers: int, parallel: ParallelConfig) -> None:
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    require(
        layers % stages == 0,
        f"parallel.pipeline_model_parallel_size={stages} does not divide num_hidden_layers={layers} of the model; "
        f"use one of {_divisors(layers)}",
    )
    require(
        (layers // stages) % (chunks or 1) == 0,
        f"parallel.virtual_pipeline_model_parallel_size={chunks} does not divide the {layers // stages} layers of a "
        f"stage (num_hidden_layers={layers} / parallel.pipeline_model_parallel_size={stages}); "
        f"use one of {_divisors(layers // stages)[1:]}, or leave it unset",
    )


def _check_engine(text: Mapping[str, Any], vision: Mapping[str, Any], tensor: int) -> None:
    heads, groups = int(text["num_attention_heads"]), int(text["num_key_value_heads"])
    intermediate, vision_heads = int(text["intermediate_size"]), int(vision["num_heads"])

    def fits(size: int) -> bool:
        # SGLang splits key/value heads, or repeats them where there are fewer of them than ranks.
        return (
            all(number % size == 0 for number in (heads, intermediate, vision_heads))
            and (groups % size == 0 or size % groups == 0)
        )  # fmt: skip

    require(
        fits(tensor),
        f"rollout.tensor_parallel_size={tensor} does not fit the model: it must divide num_attention_heads={heads}, "
        f"intermediate_size={intermediate} and the vision tower's num_heads={vision_heads}, and divide or be a "
        f"multiple of num_key_value_heads={groups}; use one of {[n for n in range(1, heads + 1) if fits(n)]}",
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
