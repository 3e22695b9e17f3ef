r"""Where in a response its answer stands: in tags, in ``\boxed{}``, or in the text itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

BOXED, TEXT = "boxed", "text"  # places that are no tags
_TAG = re.compile(r"[A-Za-z_][\w.-]*")
# One token of LaTeX as far as braces go: an escaped character (\{ opens nothing) is skipped as a whole.
_BRACES = re.compile(r"(?P<open>\\(?:boxed|fbox)\s*\{)|\\.|(?P<brace>\{)|(?P<close>\})", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An answer and how it is to be read."""

    text: str  # stripped
    delimited: bool  # True: all of it is the answer; False: the answer stands somewhere in it


def check_places(places: Sequence[str]) -> None:
    """Raise ValueError unless each is a tag's name, ``boxed`` or ``text``, the last one only at the end."""
    if not places:
        raise ValueError("extract is empty; name a tag, boxed or text")
    for place in places:
        if not isinstance(place, str) or not _TAG.fullmatch(place):
            raise ValueError(f"extract: {place!r} is not the name of a tag (write it without < and >), boxed or text")
    if TEXT in places[:-1]:
        raise ValueError(f"extract: nothing after text is ever looked at, got {list(places)}")


def find_answer(text: str, places: Sequence[str]) -> Found | None:
    r"""The answer in the first of ``places`` that ``text`` has: the inside of the last ``<tag>...</tag>``, of the last
    ``\boxed{...}`` (``boxed``), or the text itself (``text``: what follows a tag that was left open, or all of it).
    """
    for place in places:
        if place == TEXT:
            return Found(text=_after_open_tag(text, places), delimited=False)
        inside = last_boxed(text) if place == BOXED else last_block(text, place)
        if inside is not None:
            return Found(text=inside, delimited=True)
    return None


def last_block(text: str, tag: str) -> str | None:
    """The stripped inside of the last complete ``<tag>...</tag>``, line breaks included, or None."""
    open_tag = f"<{tag}>"
    end = text.rfind(f"</{tag}>")
    start = text.rfind(open_tag, 0, max(end, 0))
    return text[start + len(open_tag) : end].strip() if start >= 0 else None


def is_only_block(text: str, tag: str) -> bool:
    """Whether ``tag`` opens once, then closes once."""
    opened, closed = f"<{tag}>", f"</{tag}>"
    return text.count(opened) == text.count(closed) == 1 and text.find(opened) < text.find(closed)


def last_boxed(text: str) -> str | None:
    r"""The last of ``all_boxed``, or None."""
    boxes = all_boxed(text)
    return boxes[-1] if boxes else None


def all_boxed(text: str) -> list[str]:
    r"""The stripped insides of every complete ``\boxed{...}`` or ``\fbox{...}`` that stands in no other one, in order,
    with the braces inside it.

    One pass, whatever is left open: a response may be cut inside a box, or hold thousands of them.
    """
    stack: list[int | None] = []  # where the inside of an open box begins, None for any other brace
    found: list[tuple[int, int]] = []
    for token in _BRACES.finditer(text):
        if token["open"]:
            stack.append(token.end())
        elif token["brace"]:
            stack.append(None)
        elif token["close"] and stack:
            start = stack.pop()
            while start is not None and found and found[-1][0] > start:
                found.pop()  # a box within this one
            found += [(start, token.start())] if start is not None else []
    return [text[start:end].strip() for start, end in found]


def _after_open_tag(text: str, places: Sequence[str]) -> str:
    for tag in places[:-1]:
        _, open_tag, rest = text.rpartition(f"<{tag}>")
        if open_tag and tag != BOXED:
            return rest.strip()
    return text.strip()
