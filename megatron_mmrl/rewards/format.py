"""Whether a response has the shape ``<think>...</think> <answer>...</answer>``, or that of other tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mmrl.rewards.extract import check_places, is_only_block
from megatron_mmrl.rewards.legacy import FORMAT, original
from megatron_mmrl.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """1.0 when the response is one block of each tag, in order, else 0.0; its fields are the term's kwargs.

    Each tag opens and closes exactly once, and only white space stands between the blocks. What is inside them does not
    matter here.
    """

    tags: Sequence[str] = ("think", "answer")
    """In the order in which they must stand."""
    strict: bool = True
    """Nothing but white space may stand before the first block and after the last."""
    allow_empty: bool = True
    """A block may have nothing inside it."""
    per_block: bool = False
    """Instead of all or nothing: 1.0 for each tag that opens once and then closes once, wherever it stands."""
    legacy: bool | str = False
    """The original whose format reward this is: siirl (or true), mm_eureka, swift_r1v, gemma_math; the other fields
    then do not matter."""

    def __post_init__(self) -> None:
        if isinstance(self.tags, str):
            raise ValueError(f"tags={self.tags!r}: expected a list such as [think, answer]")
        check_places(self.tags)
        original(FORMAT, self.legacy)
        if len(set(self.tags)) != len(self.tags):
            raise ValueError(f"tags={list(self.tags)}: a tag is named twice")

    def __call__(self, prompt: Prompt, response_text: str) -> float:
        """See the class."""
        if (legacy := original(FORMAT, self.legacy)) is not None:
            return legacy(response_text)
        blocks = [is_only_block(response_text, tag) for tag in self.tags]
        if self.per_block:
            return float(sum(blocks))
        return float(all(blocks) and self._in_order(response_text))

    def at_once(self, prompt: Prompt, response_text: str) -> float | None:
        """The value, which takes time in proportion to the text; None for an original, which may take more."""
        return self(prompt, response_text) if original(FORMAT, self.legacy) is None else None

    def _in_order(self, text: str) -> bool:
        inside = ".*" if self.allow_empty else ".+"
        around = r"\s*" if self.strict else ".*"
        shape = r"\s*".join(f"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in self.tags)
        return re.fullmatch(f"{around}{shape}{around}", text, re.DOTALL) is not None


think_answer_format = Format()
"""The term without kwargs: ``think_answer_format(prompt, response_text)``."""
