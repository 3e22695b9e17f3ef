"""The policy-gradient algorithm: a name, its numbers, and what may be switched on beside it. See docs/algorithm.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_mmrl.config.checks import at_least, require

Aggregation = Literal["token_mean", "seq_mean", "fixed_length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoraConfig:
    """Keys under ``algorithm.adora.``: a group's advantages count less where its right answers are the short ones."""

    enabled: bool = False
    lamda: float = 0.1
    """Weight of a group whose longest right answer is no longer than its wrong ones on average (ADORA's spelling)."""
    length_limit: int | None = None
    """Wrong answers of this many tokens or more do not count; unset: ``rollout.max_response_tokens``."""
    threshold: float = 0.5
    """A reward above this is a right answer."""

    def __post_init__(self) -> None:
        at_least("algorithm.adora.lamda", self.lamda, 0)
        if self.length_limit is not None:
            at_least("algorithm.adora.length_limit", self.length_limit, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyFilterConfig:
    """Keys under ``algorithm.accuracy_filter.``: groups that are too hard or too easy are not learned from."""

    enabled: bool = False
    lower: float = 0.1
    """A group is kept when the mean of ``term`` is at least this ..."""
    upper: float = 0.9
    """... and at most this."""
    freezing_steps: int = -1
    """The filter acts from the step after this one on."""
    term: str = "accuracy"
    """Which reward term is looked at."""

    def __post_init__(self) -> None:
        require(
            self.lower <= self.upper,
            f"algorithm.accuracy_filter.lower={self.lower}, upper={self.upper}: lower must not be above upper",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicSamplingConfig:
    """Keys under ``algorithm.dynamic_sampling.``: ask further prompts until enough groups are kept (DAPO)."""

    enabled: bool = False
    max_rounds: int = 4
    """Rounds of generation in one step, the first included; then the step takes what there is."""
    oversample: float = 1.0
    """Ask so many times the prompts that are missing, so that fewer rounds are needed; surplus groups are dropped."""

    def __post_init__(self) -> None:
        at_least("algorithm.dynamic_sampling.max_rounds", self.max_rounds, 1)
        at_least("algorithm.dynamic_sampling.oversample", self.oversample, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchMaskConfig:
    """Keys under ``algorithm.mismatch_mask.``: leave out where trainer and engine disagree too much."""

    level: Literal["none", "token", "sequence"] = "none"
    """``token``: by pi_old / pi_rollout of each token; ``sequence``: by its geometric mean over the response."""
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        require(
            0 <= self.low < 1 < self.high,
            f"algorithm.mismatch_mask.low={self.low}, high={self.high}: need 0 <= low < 1 < high",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """Keys under ``algorithm.``"""

    name: str = "grpo"
    """A name of algorithms/registry.py."""
    clip_low: float = 0.2
    """The probability ratio is clipped below 1 - clip_low (1: no lower bound) ..."""
    clip_high: float = 0.2
    """... and above 1 + clip_high."""
    dual_clip: float | None = None
    """With a negative advantage A the loss of a token is at most ``dual_clip`` x -A; unset: unbounded."""
    kl_coef: float = 0.0
    """Weight of the KL term against the reference model; 0: no reference model is kept."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3"
    """``k3_unbiased``: the value of k3 with the gradient of k2, which is that of the true KL."""
    kl_in: Literal["loss", "reward"] = "loss"
    """``reward``: the KL is taken off the rewards, without gradient, before advantages are computed."""
    reference_refresh_every: int = 0
    """Steps after which the reference model becomes the policy as it is then; 0: it stays that of the start."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, which keeps a small policy exploring; 0: off."""
    aggregation: Aggregation | None = None
    """How token losses become one number, always with a global denominator; unset: what belongs to the name."""
    aggregation_length: int | None = None
    """Divisor of ``fixed_length``, in tokens per response; unset: ``rollout.max_response_tokens``."""
    std_floor: float = 1e-6
    """A group whose rewards' standard deviation is at most this gets zero advantages."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO); false: Dr. GRPO."""
    num_iterations: int = 1
    """Passes over one rollout (mu in the paper)."""
    mask_overlong: bool = False
    """Responses that were cut off are not learned from; they stay in the statistics of their group."""
    drop_uniform_groups: bool = False
    """Leave groups out whose rewards are all equal; see ``dynamic_sampling`` for asking others in their place."""
    accuracy_filter: AccuracyFilterConfig = field(default_factory=AccuracyFilterConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    adora: AdoraConfig = field(default_factory=AdoraConfig)
    tis_cap: float | None = None
    """Truncated importance sampling: weight min(pi_old / pi_rollout, cap) of each token; unset: off."""
    mismatch_mask: MismatchMaskConfig = field(default_factory=MismatchMaskConfig)
    max_mismatch: float | None = None
    """Stop when mean |log pi_trainer - log pi_engine| of a step exceeds this; unset: only measured."""

    def __post_init__(self) -> None:
        require(0 < self.clip_low <= 1, f"algorithm.clip_low={self.clip_low}: must lie between 0 and 1")
        require(self.clip_high > 0, f"algorithm.clip_high={self.clip_high}: must be above 0")
        require(self.dual_clip is None or self.dual_clip > 1, f"algorithm.dual_clip={self.dual_clip}: must be above 1")
        at_least("algorithm.kl_coef", self.kl_coef, 0)
        at_least("algorithm.reference_refresh_every", self.reference_refresh_every, 0)
        require(
            self.kl_coef > 0 or self.reference_refresh_every == 0,
            f"algorithm.reference_refresh_every={self.reference_refresh_every} without a reference model; "
            "set algorithm.kl_coef above 0 or leave it out",
        )
        require(
            self.kl_in == "loss" or self.kl_estimator != "k3_unbiased",
            "algorithm.kl_estimator=k3_unbiased differs from k3 in its gradient only, and algorithm.kl_in=reward has "
            "none; use k1, k2 or k3",
        )
        at_least("algorithm.entropy_coef", self.entropy_coef, 0)
        at_least("algorithm.std_floor", self.std_floor, 0)
        at_least("algorithm.num_iterations", self.num_iterations, 1)
        if self.aggregation_length is not None:
            at_least("algorithm.aggregation_length", self.aggregation_length, 1)
        if self.tis_cap is not None:
            at_least("algorithm.tis_cap", self.tis_cap, 1)
