"""What a response is worth: a weighted sum of named terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from megatron_mmrl.config.checks import at_least, require
from megatron_mmrl.config.reward_presets import DEFAULT_TERMS, PRESETS, Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """One term: ``{name: accuracy, weight: 0.9, kwargs: {}}``."""

    name: str
    """A name of rewards/registry.py, ``package.module:function`` or ``path/to/file.py:function`` (or a class)."""
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the term; checked before a model is loaded. ``style`` says how a function of one's own is
    called (mmrl, verl or swift) where its parameters do not."""
    label: str | None = None
    """What the term is called in metrics; unset: its name, of a path only the file's."""

    @property
    def key(self) -> str:
        """The term's name in scores and metrics, unique among the terms of a run."""
        place, separator, attribute = self.name.rpartition(":")
        return self.label or (f"{PurePath(place).stem}:{attribute}" if separator and "/" in place else self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Keys under ``reward.``"""

    preset: str | None = None
    """The terms of a known recipe: siirl, mm_eureka, verl_boxed, swift_r1v or gemma_math; instead of ``terms``."""
    legacy: bool = False
    """With a preset: compute what the original did, mistakes included."""
    terms: list[RewardTerm] = field(default_factory=list)
    """Empty: those of the preset; without one 0.9 x accuracy + 0.1 x format. Never empty once the config is built."""
    timeout_s: float = 5.0
    """A response whose scoring takes longer gets 0 and its worker is killed."""
    num_workers: int = 1
    """Scoring processes per scoring rank."""
    max_response_chars: int = 65536
    """Longer text is not handed to a parser: the terms of such a response are 0."""
    max_memory_bytes: int = 8 << 30
    """Address space that scoring may add to what a worker has once its terms are loaded."""

    def __post_init__(self) -> None:
        wanted = self._preset_terms()
        if not self.terms:  # filled in here, so that whoever reads ``terms`` sees what is computed
            object.__setattr__(self, "terms", wanted)
        require(
            self.preset is None or self.terms == wanted,
            f"reward.preset={self.preset} and reward.terms are both given and differ; leave out one of them "
            "(reward.terms=[] on the command line)",
        )
        keys = [term.key for term in self.terms]
        require(
            len(set(keys)) == len(keys),
            f"reward.terms names a reward twice: {keys}; give one of them a label of its own (reward.terms[0].label)",
        )
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s}: must be above 0")
        at_least("reward.num_workers", self.num_workers, 1)
        at_least("reward.max_response_chars", self.max_response_chars, 1)
        at_least("reward.max_memory_bytes", self.max_memory_bytes, 1 << 20)

    def _preset_terms(self) -> list[RewardTerm]:
        if self.preset is None:
            require(not self.legacy, "reward.legacy=true: only a reward.preset has an original to go back to")
            return _terms(DEFAULT_TERMS)
        require(
            self.preset in PRESETS,
            f"reward.preset={self.preset!r} is not known; use one of {', '.join(sorted(PRESETS))}",
        )
        corrected, original = PRESETS[self.preset]
        require(
            not self.legacy or original is not None,
            f"reward.legacy=true: the original of reward.preset={self.preset} computes the same; leave it out",
        )
        return _terms(original if self.legacy and original is not None else corrected)


def _terms(table: Terms) -> list[RewardTerm]:
    return [RewardTerm(name=name, weight=weight, kwargs=dict(kwargs)) for name, weight, kwargs in table]
