"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from megatron_mmrl.config.checks import at_least, require, within


@dataclass(frozen=True, slots=True, kw_only=True)
class LrScale:
    """Keys under ``optim.lr_scale.``: each part's learning rate is the schedule's times this."""

    vision: float = 1.0
    """The vision tower below the merger."""
    merger: float = 1.0
    language: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Keys under ``optim.``; Adam with decoupled weight decay."""

    section: ClassVar[str] = "optim"  # what messages call it

    lr: float = 1e-6
    min_lr: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From ``lr`` after the warm-up to ``min_lr`` at the last update."""
    warmup_updates: int = 0
    """Optimizer updates of linear warm-up."""
    warmup_fraction: float | None = None
    """The same as a share of all updates, rounded up; unset: ``warmup_updates`` counts."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0: off."""
    lr_scale: LrScale = field(default_factory=LrScale)

    def __post_init__(self) -> None:
        require(self.lr > 0, f"{self.section}.lr={self.lr}: must be above 0")
        within(f"{self.section}.min_lr", self.min_lr, 0.0, self.lr)
        at_least(f"{self.section}.warmup_updates", self.warmup_updates, 0)
        if self.warmup_fraction is not None:
            within(f"{self.section}.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
            require(
                self.warmup_updates == 0,
                f"{self.section}.warmup_updates={self.warmup_updates} and warmup_fraction={self.warmup_fraction} "
                "both say how long the warm-up is; set one of them",
            )
        at_least(f"{self.section}.weight_decay", self.weight_decay, 0)
        at_least(f"{self.section}.clip_grad", self.clip_grad, 0)
        for key in ("beta1", "beta2"):
            within(f"{self.section}.{key}", getattr(self, key), 0.0, 1.0)
        for part in ("vision", "merger", "language"):
            scale = getattr(self.lr_scale, part)
            require(
                scale > 0, f"{self.section}.lr_scale.{part}={scale}: must be above 0; model.freeze=[{part}] stops it"
            )
