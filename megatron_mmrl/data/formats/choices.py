"""Multiple choice: options as a list of texts in the order A, B, C, ..., whatever form a data set has them in."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from string import ascii_uppercase

# "A. x", "A) x", "(A) x", "A: x", also with Chinese punctuation, at the start of a line or after a semicolon.
_LABEL = re.compile(r"(?:^|[\n;])[ \t]*(?:\(([A-J])\)|([A-J])[.):\u3001\uff0e\uff1a])[ \t]*")


def options_in(text: str) -> list[str] | None:
    """The options that ``text`` ends with, labelled A, B, C, ... in order, or None.

    Example: ``options_in("Which?\\nA. 3\\nB. 4")`` is ``["3", "4"]``.
    """
    labels = list(_LABEL.finditer(text))
    while labels:
        run = [match for match, letter in zip(labels, ascii_uppercase, strict=False) if _letter(match) == letter]
        if len(run) == len(labels) >= 2:
            ends = [*(match.start() for match in labels[1:]), len(text)]
            return [text[match.end() : end].strip(" \t\n;") for match, end in zip(labels, ends, strict=True)]
        labels = labels[1:]  # "A. Smith draws a line" in the question is no option
    return None


def option_list(value: object) -> list[str] | None:
    """Options from a column: a list, the text of a list, or lettered text. None where there are none."""
    if isinstance(value, str):
        return _listed(value) or options_in(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        return None
    return [str(item) for item in value]


def with_options(question: str, options: Sequence[str] | None) -> str:
    """``question`` and its options below, one per line; as it is where the letters stand in the picture."""
    if not options or list(options) == list(ascii_uppercase[: len(options)]):
        return question
    lines = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question.rstrip(), "Choices:", *lines])


def _letter(match: re.Match[str]) -> str:
    return match[1] or match[2]


def _listed(text: str) -> list[str] | None:
    """``"['a', 'b']"`` -> ``["a", "b"]``."""
    if not text.strip().startswith("["):
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(item) for item in value] if isinstance(value, list) and value else None
