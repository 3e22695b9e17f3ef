"""Multiple choice: which option an answer names, by its letter or by its text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_MARKS = ".:)\u3001\uff0e\uff1a\uff09"  # what may follow a letter: also the full-width forms
_WRAPPED = re.compile(
    r"\$(?P<a>[^$]*)\$|\*\*(?P<b>[^*]*)\*\*|\\(?:text|textbf|mathrm|mathbf|boxed)\s*\{(?P<c>[^{}]*)\}|\\\((?P<d>.*)\\\)"
    r"|[\"'\u201c](?P<e>[^\"'\u201c\u201d]*)[\"'\u201d]"
)
_SAYS = r"(?:(?:the\s+)?(?:correct\s+|final\s+|right\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*){0,2}"
_LETTER = re.compile(
    rf"{_SAYS}(?:[(\uff08](?P<a>[A-Z])[)\uff09][{_MARKS}]?|(?P<b>[A-Z])(?:[{_MARKS}]|$))\s*(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_STATED = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?[\s*$(]*([A-Z])(?![A-Za-z0-9])")


def options_of(meta: Mapping[str, object], gold: str) -> list[str] | None:
    """The texts of the options; [] when only their letters are known (the gold answer is one); None: no choice."""
    choices = meta.get("choices")
    if isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 0:
        return [_without_letter(str(choice), index) for index, choice in enumerate(choices)]
    return [] if re.fullmatch(r"[A-Z]", gold.strip()) else None


def read_choice(answer: str, options: Sequence[str]) -> int | None:
    """The index of the option that ``answer`` names, or None.

    It may be an option's text, or its letter as B, b, (B), B., B), B: text, (B) text, option B, the answer is B. A
    letter in front of another option's text names nothing, and neither does one beyond the options.
    """
    answer = _unwrapped(answer)
    by_text = _index_of(answer, options)
    if by_text is not None:
        return by_text
    match = _LETTER.fullmatch(re.sub(r"[*$]", "", answer))
    if match is None:
        return None
    index = _ordinal(match["a"] or match["b"])
    elsewhere = _index_of(match["rest"], options)
    if (options and index >= len(options)) or elsewhere not in (None, index):
        return None
    return index


def stated_choice(text: str, options: Sequence[str]) -> int | None:
    """The option that a longer text says last to be its answer ("... so the answer is (B)."), or None."""
    letters = [_ordinal(letter) for letter in _STATED.findall(text)]
    return letters[-1] if letters and (not options or letters[-1] < len(options)) else None


def same_words(one: str, other: str) -> bool:
    """Whether two texts are equal but for case, spacing, a full stop at the end and what wraps them."""
    return _normal(one) == _normal(other)


def _index_of(text: str, options: Sequence[str]) -> int | None:
    equal = [index for index, option in enumerate(options) if same_words(text, option)]
    return equal[0] if text.strip() and len(equal) == 1 else None


def _without_letter(option: str, index: int) -> str:
    """``(A) 3`` and ``A. 3`` are the first option's text 3 with its own letter in front."""
    match = _LETTER.fullmatch(option.strip())
    own = match is not None and match["rest"] and _ordinal(match["a"] or match["b"]) == index
    return match["rest"].strip() if match is not None and own else option.strip()


def _ordinal(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _normal(text: str) -> str:
    return " ".join(_unwrapped(text).removesuffix(".").casefold().split())


def _unwrapped(text: str) -> str:
    """Without the dollar signs, stars, quotes or ``\\text{}`` around all of it."""
    text = text.strip()
    while match := _WRAPPED.fullmatch(text):
        text = next(inside for inside in match.groups() if inside is not None).strip()
    return text
