"""Which parameters every rank of a layout holds, from a checkpoint's ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_mmrl.models.qwen2_5_vl.config import load_config, text_sizes
from megatron_mmrl.models.qwen2_5_vl.stored import hf_shapes
from megatron_mmrl.models.qwen2_5_vl.weights import stage_table
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.sharding import WeightEntry


def held(path: Path, layout: ParallelLayout) -> Iterator[tuple[int, int, WeightEntry]]:
    """(pipeline stage, chunk, entry) of each, see ``weights.stage_table``."""
    config = load_config(path)
    vision = [name for name in hf_shapes(config) if name.startswith("visual.")]
    return stage_table(text_sizes(config), config.text_config.num_hidden_layers, vision, layout)
