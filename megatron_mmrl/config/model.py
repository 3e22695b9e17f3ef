"""Which model, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Keys under ``model.``"""

    path: str
    """Directory of a Hugging Face checkpoint (config, safetensors, tokenizer, processor)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations, in the trainer and in the engine."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recomputation in the language model."""
