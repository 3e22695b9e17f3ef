"""An optional supervised warm-up before the first GRPO step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron_mmrl.config.checks import at_least
from megatron_mmrl.config.optim import OptimConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedOptimConfig(OptimConfig):
    """Keys under ``supervised.optim.``, as under ``optim.``"""

    section: ClassVar[str] = "supervised.optim"

    lr: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedConfig:
    """Keys under ``supervised.``; targets are the rows' ``extra_info.solution``."""

    num_steps: int = 0
    """Supervised updates before GRPO; 0: none. The optimizer starts afresh afterwards."""
    batch_sequences: int = 32
    """Sequences per update, over all data-parallel ranks."""
    optim: SupervisedOptimConfig = field(default_factory=SupervisedOptimConfig)

    def __post_init__(self) -> None:
        at_least("supervised.num_steps", self.num_steps, 0)
        at_least("supervised.batch_sequences", self.batch_sequences, 1)
