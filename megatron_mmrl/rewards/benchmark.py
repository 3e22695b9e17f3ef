"""Whether an answer is right by the rules of the evaluation sets: precision, tolerance, several answers, options."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_mmrl.rewards.accuracy import Accuracy
from megatron_mmrl.rewards.extract import Found
from megatron_mmrl.rewards.mathematics import parse_answer, parse_text
from megatron_mmrl.types import Prompt

_SLACK = 1.01  # of a tolerance, as in OlympiadBench's own judge
_DECORATION = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{~?([^{}]*)\}|\\[,;!]|\^\\circ|\^\{\\circ\}|[$%\u00b0]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_JOINED = re.compile(r"[,;]|\band\b|\bor\b")
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Accuracy):
    """``Accuracy``, and what the row's own columns say about its answer:

    * ``precision`` (MathVista): a number counts when it equals the gold answer after rounding to so many decimals; with
      ``answer_type: integer`` its fraction is cut off first.
    * ``tolerance`` (OlympiadBench): a number counts when it is no farther than this from the gold answer.
    * ``answers`` (OlympiadBench): each of several must be given once, in any order.

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

    def _right(self, found: Found, gold: str, prompt: Prompt) -> bool:
        meta = prompt.meta
        answers = meta.get("answers")
        if isinstance(answers, list) and len(answers) > 1:
            return _all_given([str(answer) for answer in answers], _parts(found.text), meta)
        if isinstance(answers, list) and answers:
            gold = str(answers[0])
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


def _near(gold: float | None, value: float, meta: Mapping[str, object], index: int) -> bool:
    if gold is None:
        return False
    tolerance = meta.get("tolerance")
    if isinstance(tolerance, list):
        tolerance = tolerance[index] if index < len(tolerance) else None
    if isinstance(tolerance, int | float):
        return abs(gold - value) <= tolerance * _SLACK
    precision = meta.get("precision")
    if isinstance(precision, int | float) and not isinstance(precision, bool):
        value = math.trunc(value) if meta.get("answer_type") == "integer" else value
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
