"""Which parameters every rank of a layout holds, from a checkpoint's ``config.json`` alone. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mmrl.models.qwen2_5_vl.sizes import tensor_shapes, text_sizes, text_values
from megatron_mmrl.models.qwen2_5_vl.weights import stage_table
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.sharding import WeightEntry


def held(config: Mapping[str, Any], layout: ParallelLayout) -> Iterator[tuple[int, int, WeightEntry]]:
    """(pipeline stage, chunk, entry) of each, see ``weights.stage_table``."""
    vision = [name for name in tensor_shapes(config) if name.startswith("visual.")]
    return stage_table(text_sizes(config), text_values(config)["num_hidden_layers"], vision, layout)
