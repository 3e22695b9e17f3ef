"""The tensors that Hugging Face gives a model to plan for: transformers' own answer, to compare ours with."""

from __future__ import annotations

from pathlib import Path

from megatron_mmrl.models.qwen2_5_vl import stored
from megatron_mmrl.models.qwen2_5_vl.config import load_config


def hf_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the Hugging Face model, by original name, a tied output layer left out."""
    return stored.hf_shapes(load_config(path))
