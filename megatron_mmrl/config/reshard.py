"""How weights come from the trainer to the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mmrl.config.checks import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardConfig:
    """Keys under ``reshard.``"""

    method: Literal["in_place", "reference"] = "in_place"
    """``in_place``: the engine reads the trainer's memory, and only what lies differently there is moved.
    ``reference``: full tensors under Hugging Face names, gathered and sent over HTTP. See docs/resharding.md."""
    verify_every: int = 20
    """Every so many steps, and at the first hand-over, all of the engines' weights are compared with the trainer's by
    checksum; at the others one in so many tensors, another lot each time."""
    bucket_bytes: int = 1 << 28
    """Memory of a rank for what is on its way from or to another node."""

    def __post_init__(self) -> None:
        at_least("reshard.verify_every", self.verify_every, 1)
        at_least("reshard.bucket_bytes", self.bucket_bytes, 1)
