"""Whether a response's answer equals the gold answer, as math-verify sees it.

Nothing here limits time: expressions such as 9^(9^(9^9)) take for ever. ``pool.py`` runs it in a process that can
be killed, which is why math-verify's own limits (SIGALRM, which cannot interrupt one long C call) stay off.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron_mmrl.types import Prompt

if TYPE_CHECKING:
    from sympy import Basic, MatrixBase

_OPEN, _CLOSE = "<answer>", "</answer>"
_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")  # says itself where its mathematics begins
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}")  # no LaTeX command, no function
_TWO_NUMBERS = re.compile(r"\d\s+\d")


def accuracy(prompt: Prompt, response_text: str) -> float:
    """1.0 when the text inside the last ``<answer>...</answer>`` equals ``prompt.answer``, else 0.0.

    Equal means the same string, or the same mathematics (1/2 and 0.5). A response without an answer block gets 0,
    and so does any response to a gold answer that cannot be parsed.
    """
    answer = extract_answer(response_text)
    if answer is None:
        return 0.0
    gold = _parse_gold(prompt.answer)
    if not gold:
        return 0.0
    if answer == prompt.answer.strip():
        return 1.0
    return float(_same_mathematics(gold, _parse(answer)))


def gold_is_parsable(answer: str) -> bool:
    """Whether a gold answer can be compared with at all. Rows where it cannot are dropped and counted."""
    return bool(_parse_gold(answer))


def extract_answer(response_text: str) -> str | None:
    """The stripped text inside the last complete ``<answer>...</answer>``, or None."""
    end = response_text.rfind(_CLOSE)
    start = response_text.rfind(_OPEN, 0, max(end, 0))
    return response_text[start + len(_OPEN) : end].strip() if start >= 0 else None


@lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> list[Basic | MatrixBase | str]:
    return _parse(answer.strip())


def _parse(answer: str) -> list[Basic | MatrixBase | str]:
    """The expressions that math-verify finds in an answer taken out of its tags; [] when it finds none.

    The answer is read as a whole: without delimiters of its own it is put between dollar signs, since math-verify
    otherwise picks single numbers out of it (1 out of "1+x^2", 2 out of "2:30"). Not so when it has words, which
    would be read as products of letters ("cat" would equal "act"). Two numbers side by side are no single answer,
    though the LaTeX parser adds them up ("3 4" would equal 7).
    """
    from math_verify import parse

    if _TWO_NUMBERS.search(answer):
        return []
    whole = answer if _DELIMITED.search(answer) or _WORD.search(answer) else f"${answer}$"
    return [found for found in parse(whole, parsing_timeout=None) if not isinstance(found, str)]


def _same_mathematics(gold: list[Basic | MatrixBase | str], answer: list[Basic | MatrixBase | str]) -> bool:
    from math_verify import verify

    return bool(answer) and verify(gold, answer, timeout_seconds=None)
