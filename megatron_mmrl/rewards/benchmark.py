"""Whether an answer is right by the rules of the evaluation sets: precision, tolerance, several answers, options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_mmrl.rewards.accuracy import Accuracy
from megatron_mmrl.rewards.choices import read_choice, same_words
from megatron_mmrl.rewards.extract import BOXED, TEXT, Found, all_boxed, find_answer
from megatron_mmrl.rewards.mathematics import parse_answer, parse_text
from megatron_mmrl.types import Prompt

_SLACK = 1.01  # of a tolerance, as in OlympiadBench's own judge
_DECORATION = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{~?([^{}]*)\}|\\[,;!]|\^\\circ|\^\{\\circ\}|[$%\u00b0]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_WORDS = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}")
_JOINED = re.compile(r"[,;]|\band\b|\bor\b")
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Accuracy):
    """``Accuracy``, and what the row's own columns say about its answer:

    * ``precision`` (MathVista): a number counts when it equals the gold answer after rounding to so many decimals.
    * ``answer_type: integer`` (MathVista): a number counts when it does once its fraction is cut off.
    * ``tolerance`` (OlympiadBench): a number counts when it is no farther than this from the gold answer.
    * ``answers`` (OlympiadBench): each of several must be given once, in any order, in one box or in a box each.
    * words in ``\\text{}`` (MATH-500): count without it, and in any case.

    No question is left out: one whose gold answer nothing can be compared with counts as answered wrongly.
    """

    extract: str | Sequence[str] = ("answer", "boxed", "text")
    string: bool = True
    reads_meta: ClassVar[Sequence[str]] = (
        *Accuracy.reads_meta,
        "answers",
        "answer_type",
        "precision",
        "tolerance",
        "unit",
    )

    def accepts(self, _: Prompt) -> bool:
        """See the class."""
        return True

    def at_once(self, prompt: Prompt, response_text: str) -> float | None:
        """Never: the row's rules have a say after what ``Accuracy`` can tell."""
        return None

    def __call__(self, prompt: Prompt, response_text: str) -> float:
        """See the class."""
        if Accuracy.__call__(self, prompt, response_text):
            return 1.0
        answers = _answers(prompt)
        if len(answers) < 2 or BOXED not in self.places or self._tagged(response_text):
            return 0.0
        boxes = all_boxed(response_text)[-len(answers) :]
        return float(_all_given(answers, [part for box in boxes for part in _parts(box)], prompt.meta))

    def _tagged(self, response_text: str) -> bool:
        tags = [place for place in self.places if place not in (BOXED, TEXT)]
        return find_answer(response_text, tags) is not None

    def _right(self, found: Found, gold: str, prompt: Prompt) -> bool:
        meta = prompt.meta
        answers = _answers(prompt)
        if len(answers) > 1:
            return _all_given(answers, _parts(found.text), meta)
        gold = answers[0] if answers else gold
        if found.delimited and _is_word(gold, found.text):
            return True
        if Accuracy._right(self, found, gold, prompt):  # a slotted dataclass is made twice: super() knows the first
            return True
        value = number(found.text, delimited=found.delimited, unit=meta.get("unit"))
        return value is not None and _near(number(gold), value, meta, 0)


def number(text: str, *, delimited: bool = True, unit: object = None) -> float | None:
    """The value of an answer that is one finite number, unit and decoration aside; None for everything else."""
    plain = _THOUSANDS.sub("", _DECORATION.sub(lambda match: match.group(1) or "", text)).strip().rstrip(".")
    if isinstance(unit, str) and unit.strip():
        plain = plain.removesuffix(_DECORATION.sub(lambda match: match.group(1) or "", unit).strip()).strip()
    plain = plain.rpartition("=")[2].strip()
    try:
        value = float(plain)
    except ValueError:
        found = parse_answer(plain) if delimited else parse_text(text)
        numbers = [each for each in found if getattr(each, "is_number", False) and getattr(each, "is_real", False)]
        value = float(numbers[0]) if numbers else math.nan
    return value if math.isfinite(value) else None


def _answers(prompt: Prompt) -> list[str]:
    answers = prompt.meta.get("answers")
    return [str(answer) for answer in answers] if isinstance(answers, list) else []


def _is_word(gold: str, answer: str) -> bool:
    r"""Whether ``answer`` is the word, or the option's letter, that a gold answer such as ``\text{(C)}`` wraps."""
    words = _WORDS.fullmatch(gold.strip("$ "))
    if words is None:
        return False
    letter = re.fullmatch(r"\(?([A-Z])\)?", words[1].strip())
    return same_words(words[1], answer) or (letter is not None and read_choice(answer, ()) == ord(letter[1]) - ord("A"))


def _near(gold: float | None, value: float, meta: Mapping[str, object], index: int) -> bool:
    if gold is None:
        return False
    tolerance = meta.get("tolerance")
    if isinstance(tolerance, list):
        tolerance = tolerance[index] if index < len(tolerance) else None
    if isinstance(tolerance, int | float):
        return abs(gold - value) <= tolerance * _SLACK
    value = math.trunc(value) if meta.get("answer_type") == "integer" else value
    precision = meta.get("precision")
    if isinstance(precision, int | float) and not isinstance(precision, bool):
        return round(value, int(precision)) == round(gold, int(precision))
    return value == gold


def _all_given(gold: Sequence[str], given: Sequence[str], meta: Mapping[str, object]) -> bool:
    """Whether ``given`` holds each gold answer once and nothing else."""
    left = list(given)
    for index, answer in enumerate(gold):
        match = next((other for other in left if _same(answer, other, meta, index)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _same(gold: str, answer: str, meta: Mapping[str, object], index: int) -> bool:
    prompt = Prompt(id="", source="", messages=(), images=(), answer=gold)
    if Accuracy(extract="text", string=True, multiple_choice=False)._right(
        Found(text=answer, delimited=True), gold, prompt
    ):
        return True
    value = number(answer, unit=meta.get("unit"))
    return value is not None and _near(number(gold), value, meta, index)


def _parts(text: str) -> list[str]:
    """An answer cut at the commas, semicolons and the words "and", "or" that stand in no bracket."""
    plain = text.replace("$", " ")
    depth, start, parts = 0, 0, []
    cuts = {match.start(): match.end() for match in _JOINED.finditer(plain)}
    for at, char in enumerate(plain):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and at in cuts:
            parts.append(plain[start:at])
            start = cuts[at]
    return [part.strip() for part in (*parts, plain[start:]) if part.strip()]
