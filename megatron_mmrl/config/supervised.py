"""An optional supervised warm-up before the first GRPO step."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mmrl.config.checks import at_least
from megatron_mmrl.config.optim import OptimConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedConfig:
    """Keys under ``supervised.``; targets are the rows' ``extra_info.solution``."""

    num_steps: int = 0
    """Supervised updates before GRPO; 0: none. The optimizer starts afresh afterwards."""
    batch_sequences: int = 32
    """Sequences per update, over all data-parallel ranks."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))

    def __post_init__(self) -> None:
        at_least("supervised.num_steps", self.num_steps, 0)
        at_least("supervised.batch_sequences", self.batch_sequences, 1)
