"""The policy-gradient algorithm: a named preset and its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mmrl.config.checks import at_least, require


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """Keys under ``algorithm.``"""

    name: str = "grpo"
    """A name of algorithms/registry.py."""
    clip_low: float = 0.2
    """The probability ratio is clipped below 1 - clip_low ..."""
    clip_high: float = 0.2
    """... and above 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL term against the reference model; 0: no reference model is kept."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which keeps a small policy exploring; 0: off."""
    aggregation: Literal["token_mean", "seq_mean"] = "token_mean"
    """How token losses become one number; always with a global denominator."""
    std_floor: float = 1e-6
    """A group whose rewards' standard deviation is at most this gets zero advantages."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); false: Dr. GRPO."""
    num_iterations: int = 1
    """Passes over one rollout (mu in the paper)."""
    drop_uniform_groups: bool = False
    """Leave groups out whose rewards are all equal (DAPO's dynamic sampling, without resampling)."""
    tis_cap: float | None = None
    """Truncated importance sampling: weight min(pi_old / pi_rollout, cap); unset: off."""
    max_mismatch: float | None = None
    """Stop when mean |log pi_trainer - log pi_engine| of a step exceeds this; unset: only measured."""

    def __post_init__(self) -> None:
        require(0 < self.clip_low < 1, f"algorithm.clip_low={self.clip_low}: must lie between 0 and 1")
        require(self.clip_high > 0, f"algorithm.clip_high={self.clip_high}: must be above 0")
        at_least("algorithm.kl_coef", self.kl_coef, 0)
        at_least("algorithm.entropy_coef", self.entropy_coef, 0)
        at_least("algorithm.std_floor", self.std_floor, 0)
        at_least("algorithm.num_iterations", self.num_iterations, 1)
        if self.tis_cap is not None:
            at_least("algorithm.tis_cap", self.tis_cap, 1)
