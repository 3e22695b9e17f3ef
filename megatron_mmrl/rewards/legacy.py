"""What the original recipes compute, their mistakes included, for comparing with runs of theirs.

Nothing here is better than ``accuracy.py`` and ``format.py``; ``docs/rewards.md`` lists what differs. The names are
those of ``reward.preset``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

LegacyAccuracy = Callable[[str, str], float]  # (gold, response text)
LegacyFormat = Callable[[str], float]
T = TypeVar("T")

_ANSWER = re.compile(r"<answer>(.*?)</answer>")  # without DOTALL: an answer of several lines is not found
_SOLUTION = re.compile(r"<SOLUTION>(.*?)</SOLUTION>", re.DOTALL)
_REASONING = re.compile(r"<REASONING>(.*?)</REASONING>", re.DOTALL)
_SWIFT_SHAPE = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>(?![\s\S])", re.DOTALL)
_EUREKA_SHAPE = re.compile(r".*<think>.+</think>\s*<answer>.+</answer>.*", re.DOTALL)
_EUREKA_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LETTERS = "abcd"


def original(table: Mapping[str, T], legacy: bool | str) -> T | None:
    """The function of the original that ``legacy`` names (true: the first of ``table``); None for false.

    Raises:
        ValueError: there is no such original.
    """
    if legacy is False:
        return None
    name = next(iter(table)) if legacy is True else legacy
    if name not in table:
        raise ValueError(
            f"legacy={legacy!r} is not known; use one of {', '.join(table)}, or true for {next(iter(table))}"
        )
    return table[name]


def _siirl_accuracy(gold: str, text: str) -> float:
    return _eureka_accuracy(gold, text)


def _mm_eureka_accuracy(gold: str, text: str) -> float:
    return _eureka_accuracy(f"${gold}$", text) if text.strip() else 0.0


def _eureka_accuracy(gold: str, text: str) -> float:
    """A gold answer that cannot be parsed gives 1; tags are parsed along with what they hold; gold and answer are
    swapped in the comparison; a lone letter among a, b, c, d anywhere in the answer's words is a choice.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse, verify

    golds = parse(gold, parsing_timeout=None)
    if not golds:
        return 1.0
    found = _ANSWER.search(text)
    tagged = found[0] if found else text.split("<answer>")[-1]
    everything = [StringExtractionConfig(), LatexExtractionConfig(), ExprExtractionConfig()]
    answer = parse(tagged, extraction_config=everything, parsing_timeout=None)
    if verify(answer, golds, timeout_seconds=None):
        return 1.0
    said = (found[1] if found else tagged).replace("</answer>", "").replace("<answer>", "").lower()
    letters = {str(each).lower() for each in golds} & set(_LETTERS)
    return float(any({other for other in _LETTERS if other in said} == {letter} for letter in letters))


def _swift_accuracy(gold: str, text: str) -> float:
    """math-verify on the whole response, thoughts and tags included, then the first answer block as a string."""
    from math_verify import parse, verify

    if verify(parse(text, parsing_timeout=None), parse(gold, parsing_timeout=None), timeout_seconds=None):
        return 1.0
    inside = [found[1] if (found := _ANSWER.search(each)) else each for each in (gold, text)]
    return float(inside[0].strip() == inside[1].strip())


def _gemma_accuracy(gold: str, text: str) -> float:
    """Equal character for character but for line breaks, in the only solution block: " 45" is not 45."""
    blocks = _SOLUTION.findall(text)
    return float(len(blocks) == 1 and blocks[0].replace("\n", "") == gold)


def _eureka_format(text: str) -> float:
    """0.5 where 1.0 was meant."""
    once = all(text.count(tag) == 1 for tag in _EUREKA_TAGS)
    return 0.5 if once and _EUREKA_SHAPE.fullmatch(text) else 0.0


def _swift_format(text: str) -> float:
    """Tags may be repeated inside the blocks, and a line break at the end is too much."""
    return float(_SWIFT_SHAPE.match(text) is not None)


def _gemma_format(text: str) -> float:
    """Pairs of tags are counted, so that a tag opened twice and closed once is one block."""
    return float(sum(len(shape.findall(text)) == 1 for shape in (_REASONING, _SOLUTION)))


ACCURACY: Mapping[str, LegacyAccuracy] = {
    "siirl": _siirl_accuracy,
    "mm_eureka": _mm_eureka_accuracy,
    "swift_r1v": _swift_accuracy,
    "gemma_math": _gemma_accuracy,
}
FORMAT: Mapping[str, LegacyFormat] = {
    "siirl": _eureka_format,
    "mm_eureka": _eureka_format,
    "swift_r1v": _swift_format,
    "gemma_math": _gemma_format,
}
