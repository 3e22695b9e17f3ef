"""Which model, and in which precision."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_mmrl.config.checks import at_least, require

PARTS = ("vision", "merger", "language")
"""What a model consists of: the tower below the merger, the merger, everything else."""
PATTERN = "re:"
"""An entry of ``model.freeze`` that begins so is a regular expression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Keys under ``model.``"""

    path: str
    """Directory of a Hugging Face checkpoint (config, safetensors, tokenizer, processor)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations, in the trainer and in the engine."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation recomputation in the language model."""
    freeze: list[str] = field(default_factory=list)
    r"""What is not trained: ``vision`` (the tower below the merger), ``merger``, ``language``, or ``re:`` and a regular
    expression for whole tensor names of the published checkpoints, such as ``re:visual\.blocks\.[0-7]\..*``."""
    image_cache_bytes: int = 1 << 30
    """While ``vision`` is frozen, what it makes of an image is kept in host memory up to this size per rank, so that
    an image is encoded once per run; 0: off. The reference model, always frozen, has a cache of its own."""

    def __post_init__(self) -> None:
        at_least("model.image_cache_bytes", self.image_cache_bytes, 0)
        for index, entry in enumerate(self.freeze):
            require(
                entry in PARTS or entry.startswith(PATTERN),
                f"model.freeze[{index}]={entry!r}: must be one of {', '.join(PARTS)}, or {PATTERN} and a regular "
                "expression for tensor names",
            )
            try:
                re.compile(entry.removeprefix(PATTERN))
            except re.error as error:
                raise ValueError(f"model.freeze[{index}]={entry!r} is no regular expression: {error}") from error
        require(not set(self.freeze) >= set(PARTS), f"model.freeze={self.freeze}: leaves nothing to train")
