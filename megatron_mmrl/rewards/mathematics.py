"""math-verify: from an answer's text to expressions, and whether two are equal.

Nothing here limits time: expressions such as 9^(9^(9^9)) take for ever. ``pool.py`` runs it in a process that can
be killed, which is why math-verify's own limits (SIGALRM, which cannot interrupt one long C call) stay off.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latex2sympy2_extended.latex2sympy2 import PSParser
    from sympy import Basic, MatrixBase

    Expressions = list[Basic | MatrixBase]

_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")  # says itself where its mathematics begins
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sqrt|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}")  # no LaTeX command, no function
_TWO_NUMBERS = re.compile(r"\d\s+\d")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]+\*?\}")  # whose name is no word
_ARGUMENT = re.compile(r"\\[dt]?frac\s*\d\s+\d|[_^]\s*\d+")  # \frac 1 2, \log_2 8: no numbers side by side
# Numbers whose comparison by math-verify is that of their values, but for a fraction and a decimal that nearly agree:
# math-verify rounds them to six places, and finds 1/3 and 0.333333 equal.
_WHOLE = r"(?:0|[1-9][0-9]{0,8})"
_DECIMAL = re.compile(rf"-?{_WHOLE}(?:\.[0-9]{{1,6}})?")
_FRACTION = re.compile(
    rf"(?P<sign>-?)(?:(?P<a>{_WHOLE})/(?P<b>[1-9][0-9]{{0,8}})|\\[dt]?frac\{{(?P<c>{_WHOLE})\}}\{{(?P<d>[1-9][0-9]{{0,8}})\}})"
)
_NEARLY = Fraction(1, 100_000)  # ten times what the rounding can bridge


@lru_cache(maxsize=4096)
def plain_number(answer: str) -> Fraction | None:
    r"""The value of an ordinary number such as 12, -0.5, 1/2 or \frac{1}{2}, without a parser; else None."""
    if _DECIMAL.fullmatch(answer):
        return Fraction(answer)
    if match := _FRACTION.fullmatch(answer):
        return Fraction(int(match["a"] or match["c"]), int(match["b"] or match["d"])) * (-1 if match["sign"] else 1)
    return None


def same_plain_numbers(gold: str, answer: str) -> bool | None:
    """Whether two ordinary numbers are equal; None where math-verify has to say."""
    one, other = plain_number(gold), plain_number(answer)
    if one is None or other is None:
        return None
    if one == other:
        return True
    both = gold + answer
    mixed = "." in both and ("/" in both or "frac" in both)
    return None if mixed and abs(one - other) < _NEARLY else False


@lru_cache(maxsize=4096)
def parse_gold(answer: str) -> Expressions:
    """``parse_answer``, remembered: a group of responses shares one gold answer. Do not change what it returns."""
    return parse_answer(answer)


def parse_answer(answer: str) -> Expressions:
    """The expressions that math-verify finds in an answer taken out of its tags; [] when it finds none.

    The answer is read as a whole: without delimiters of its own it is put between dollar signs, since math-verify
    otherwise picks single numbers out of it (1 out of "1+x^2", 2 out of "2:30"). Not so when it has words, which
    would be read as products of letters ("cat" would equal "act"). Two numbers side by side are no single answer,
    though the LaTeX parser adds them up ("3 4" would equal 7).
    """
    if _TWO_NUMBERS.search(_ARGUMENT.sub("", answer)):
        return []
    as_it_is = _DELIMITED.search(answer) or _WORD.search(_ENVIRONMENT.sub("", answer))
    return parse_text(answer if as_it_is else f"${answer}$")


def hurry_latex_parser() -> None:
    """Let latex2sympy, which math-verify parses with, read in two stages from now on. Not for a process of others'.

    Its grammar makes ANTLR look at the context of the calling rules in nearly every expression, and the states of that
    are not kept (latex2sympy2-extended 1.11.0, antlr4 4.13.2): a fifth of all scoring. Read without the context first,
    and with it where that ends in an error, a text gives the same tree: ANTLR's documentation of
    ``PredictionMode.SLL`` says why. Safe to call again.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from antlr4.error.Errors import ParseCancellationException
    from antlr4.error.ErrorStrategy import BailErrorStrategy
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    if _slow_parsers:
        return
    slow = _Latex2Sympy.create_parser
    _slow_parsers.append(slow)

    def create_parser(self: _Latex2Sympy, latex: str) -> PSParser:
        parser = slow(self, latex)
        parser._interp.predictionMode, parser._errHandler = PredictionMode.SLL, BailErrorStrategy()
        read = parser.math

        def math() -> PSParser.MathContext:
            try:
                return read()
            except ParseCancellationException:
                return slow(self, latex).math()

        parser.math = math
        return parser

    _Latex2Sympy.create_parser = create_parser


_slow_parsers: list[object] = []  # what was replaced, once it was


def parse_text(text: str) -> Expressions:
    """The expressions that math-verify picks out of a text of any length, boxed ones first."""
    from math_verify import parse

    return [found for found in parse(text, parsing_timeout=None) if not isinstance(found, str)]


def same_mathematics(gold: Expressions, answer: Expressions) -> bool:
    """Whether math-verify finds one of ``answer`` equal to one of ``gold``; False when either is empty."""
    from math_verify import verify

    return bool(gold) and bool(answer) and verify(gold, answer, timeout_seconds=None)
