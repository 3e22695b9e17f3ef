"""Whether a response's answer is the gold answer: the same string, the same choice, or the same mathematics.

Cheap comparisons come first; math-verify (``mathematics.py``) is asked only where they cannot tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from megatron_mmrl.rewards.choices import options_of, read_choice, same_words, stated_choice
from megatron_mmrl.rewards.extract import BOXED, TEXT, Found, check_places, find_answer, is_only_block
from megatron_mmrl.rewards.legacy import ACCURACY, original
from megatron_mmrl.rewards.mathematics import (
    parse_answer,
    parse_gold,
    parse_text,
    plain_number,
    same_mathematics,
    same_plain_numbers,
)
from megatron_mmrl.types import Prompt

_SHORT_CHARS = 64  # of an answer that any regular expression here reads in no time


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """1.0 when the response's answer equals ``prompt.answer``, else 0.0; its fields are the term's kwargs.

    Equal means the same string, or the same mathematics (1/2 and 0.5). A response without an answer gets 0, and so does
    any response to a gold answer with which nothing can be compared.
    """

    extract: str | Sequence[str] = "answer"
    """Where the answer stands, in order of preference: tags (``answer``, ``SOLUTION``), ``boxed``, ``text``."""
    string: bool = False
    """Equal up to spacing counts too, so gold answers that are no mathematics ("Alabama") can be rewarded."""
    multiple_choice: bool = True
    """Where ``prompt.meta["choices"]`` gives options, or the gold answer is a capital letter: letters and texts are
    compared as choices, whichever of them question and answer use."""
    only_block: bool = False
    """A tag that does not stand exactly once holds no answer."""
    max_answer_chars: int = 4096
    """A longer answer is compared as a string only."""
    legacy: bool | str = False
    """The original whose accuracy this is, mistakes included: siirl (or true), mm_eureka, swift_r1v, gemma_math; the
    other fields then do not matter."""

    reads_meta: ClassVar[Sequence[str]] = ("choices",)
    """Keys of ``prompt.meta`` that its value depends on."""

    def __post_init__(self) -> None:
        check_places(self.places)
        original(ACCURACY, self.legacy)
        if self.max_answer_chars < 1:
            raise ValueError(f"max_answer_chars={self.max_answer_chars}: must be at least 1")

    @property
    def places(self) -> Sequence[str]:
        return (self.extract,) if isinstance(self.extract, str) else self.extract

    def __call__(self, prompt: Prompt, response_text: str) -> float:
        """See the class."""
        if (legacy := original(ACCURACY, self.legacy)) is not None:
            return legacy(prompt.answer, response_text)
        found = self._found(response_text)
        return float(found is not None and self._right(found, self._gold(prompt), prompt))

    def at_once(self, prompt: Prompt, response_text: str) -> float | None:
        """The value where it takes no parser and no longer than reading the text, whatever that holds; else None."""
        if original(ACCURACY, self.legacy) is not None or prompt.meta.get("choices"):
            return None
        found, gold = self._found(response_text), self._gold(prompt)
        if found is None:
            return 0.0
        right = self._told(found, gold, prompt) if max(len(found.text), len(gold)) <= _SHORT_CHARS else None
        return None if right is None else float(right)

    def accepts(self, prompt: Prompt) -> bool:
        """Whether anything can be compared with the gold answer. Rows where nothing can are dropped and counted."""
        if original(ACCURACY, self.legacy) is not None:
            return True  # the originals reward what they cannot parse
        gold = self._gold(prompt)
        options = self._options(gold, prompt)
        if options is not None and read_choice(gold, options) is not None:
            return True
        return bool(gold) if self.string else _is_mathematics(gold)

    def _gold(self, prompt: Prompt) -> str:
        """Some data sets keep the gold answer in the tags that the response must use."""
        tagged = find_answer(prompt.answer, [place for place in self.places if place != TEXT])
        return tagged.text if tagged else prompt.answer.strip()

    def _found(self, text: str) -> Found | None:
        tags = [place for place in self.places if place not in (BOXED, TEXT)]
        if self.only_block and not all(is_only_block(text, tag) for tag in tags):
            return None
        return find_answer(text, self.places)

    def _right(self, found: Found, gold: str, prompt: Prompt) -> bool:
        told = self._told(found, gold, prompt)
        if told is not None:
            return told
        answer = found.text
        options = self._options(gold, prompt)
        if options is not None:
            gold = _option(options, read_choice(gold, options), gold)
            answer = _option(options, _named(found, options), answer)
        return self._equal(gold, answer, delimited=found.delimited, words=options is not None)

    def _told(self, found: Found, gold: str, prompt: Prompt) -> bool | None:
        """What can be said without math-verify: equal strings, choices, plain numbers."""
        answer = found.text
        if found.delimited and answer == gold and (self.string or plain_number(gold) is not None):
            return bool(gold)
        options = self._options(gold, prompt)
        if options is not None:
            named, wanted = _named(found, options), read_choice(gold, options)
            return None if named is None or wanted is None else named == wanted
        if found.delimited and len(answer) <= self.max_answer_chars:
            return same_plain_numbers(gold, answer)
        return None

    def _options(self, gold: str, prompt: Prompt) -> list[str] | None:
        return options_of(prompt.meta, gold) if self.multiple_choice else None

    def _equal(self, gold: str, answer: str, *, delimited: bool, words: bool) -> bool:
        """As strings where that is asked for, else as mathematics."""
        if self.string and gold and answer.split() == gold.split():
            return True
        if words and gold and same_words(gold, answer):
            return True
        if len(answer) > self.max_answer_chars and delimited:
            return answer == gold and _is_mathematics(gold)
        return is_equal(gold, answer) if delimited else same_mathematics(parse_gold(gold), parse_text(answer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxed:
    r"""-1.0 without a ``\boxed{}``, 1.0 when the inside of the last one equals the gold answer, else 0.0."""

    multiple_choice: bool = True
    max_answer_chars: int = 4096
    reads_meta: ClassVar[Sequence[str]] = Accuracy.reads_meta

    def __call__(self, prompt: Prompt, response_text: str) -> float:
        """See the class."""
        if find_answer(response_text, (BOXED,)) is None:
            return -1.0
        return self._accuracy()(prompt, response_text)

    def at_once(self, prompt: Prompt, response_text: str) -> float | None:
        """See ``Accuracy.at_once``."""
        if find_answer(response_text, (BOXED,)) is None:
            return -1.0
        return self._accuracy().at_once(prompt, response_text)

    def accepts(self, prompt: Prompt) -> bool:
        """See ``Accuracy.accepts``."""
        return self._accuracy().accepts(prompt)

    def _accuracy(self) -> Accuracy:
        return Accuracy(extract=BOXED, multiple_choice=self.multiple_choice, max_answer_chars=self.max_answer_chars)


accuracy = Accuracy()
"""The term without kwargs: ``accuracy(prompt, response_text)``."""


@lru_cache(maxsize=1 << 14)
def is_equal(gold: str, answer: str) -> bool:
    """Whether two answers, each as a whole, are the same mathematics; never so for a gold answer that is none.

    Remembered: the responses of a group differ in their thoughts more than in their answers.
    """
    if (same := same_plain_numbers(gold, answer)) is not None:
        return same
    if answer == gold:
        return _is_mathematics(gold)
    return bool(parse_gold(gold)) and same_mathematics(parse_gold(gold), parse_answer(answer))


def _is_mathematics(gold: str) -> bool:
    return plain_number(gold) is not None or bool(parse_gold(gold))


def _named(found: Found, options: Sequence[str]) -> int | None:
    """The option that the answer names, or that the text it stands in says to be it."""
    named = read_choice(found.text, options)
    return stated_choice(found.text, options) if named is None and not found.delimited else named


def _option(options: Sequence[str], index: int | None, text: str) -> str:
    return options[index] if index is not None and options else text
