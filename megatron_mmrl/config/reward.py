"""What a response is worth: a weighted sum of named terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_mmrl.config.checks import at_least, require


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One term: ``{name: accuracy, weight: 0.9, kwargs: {}}``."""

    name: str
    """A name of rewards/registry.py or ``package.module:function``."""
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the term's function; checked when the workers start."""


def _default_terms() -> list[RewardTerm]:
    return [RewardTerm(name="accuracy", weight=0.9), RewardTerm(name="format", weight=0.1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Keys under ``reward.``"""

    terms: list[RewardTerm] = field(default_factory=_default_terms)
    timeout_s: float = 5.0
    """A response whose scoring takes longer gets 0 and its worker is killed."""
    num_workers: int = 1
    """Scoring processes per scoring rank."""
    max_response_chars: int = 65536
    """Longer text is not handed to a parser: the terms of such a response are 0."""

    def __post_init__(self) -> None:
        require(len(self.terms) > 0, "reward.terms is empty; at least one reward is needed")
        names = [term.name for term in self.terms]
        require(len(set(names)) == len(names), f"reward.terms names a reward twice: {names}")
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s}: must be above 0")
        at_least("reward.num_workers", self.num_workers, 1)
        at_least("reward.max_response_chars", self.max_response_chars, 1)
