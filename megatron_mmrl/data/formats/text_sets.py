"""Text sets that reasoning models are compared on: AIME 2024, MATH-500 and GPQA-Diamond. No images."""

from __future__ import annotations

import hashlib

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats.choices import with_options
from megatron_mmrl.data.formats.row import ReadImage, Row, answer_text, build_prompt, other_columns, text_of
from megatron_mmrl.types import IMAGE_TAG, Message, Prompt

_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def read_aime24(row: Row, prompt_id: str, _: ReadImage) -> Prompt:
    """``HuggingFaceH4/aime_2024``: ``{id, problem, solution, answer, url, year}``.

    Raises:
        BadRowError: no problem or answer.
    """
    return _problem(row, prompt_id, source="aime24", identity="id")


def read_math500(row: Row, prompt_id: str, _: ReadImage) -> Prompt:
    """``HuggingFaceH4/MATH-500``: ``{problem, solution, answer, subject, level, unique_id}``.

    Raises:
        BadRowError: no problem or answer.
    """
    return _problem(row, prompt_id, source="math500", identity="unique_id")


def read_gpqa(row: Row, prompt_id: str, _: ReadImage) -> Prompt:
    """``Idavidrein/gpqa``: ``{Question, Correct Answer, Incorrect Answer 1 .. 3, High-level domain, Subdomain, ...}``.

    The options are put in an order that only the question decides, so that the right one is anywhere and everywhere
    the same. ``meta["subject"]`` is the high-level domain. Of the other columns (reviewers' notes) none is kept.

    Raises:
        BadRowError: no question, or an answer is missing.
    """
    question = _plain(row, "Question")
    right = answer_text(row.get("Correct Answer"), "Correct Answer")
    options = [right, *(answer_text(row.get(name), name) for name in _WRONG)]
    if len(set(options)) != len(options):
        raise BadRowError(f"two of the options are the same: {options}")
    options.sort(key=lambda option: hashlib.sha256(f"{question}\0{option}".encode()).digest())
    named = {"subject": row.get("High-level domain"), "subfield": row.get("Subdomain")}
    return build_prompt(
        prompt_id,
        source="gpqa_diamond",
        messages=(Message(role="user", text=with_options(question, options)),),
        images=(),
        answer="ABCD"[options.index(right)],
        meta={
            "choices": options,
            "question_id": str(row.get("Record ID") or prompt_id),
            **{key: value for key, value in named.items() if value is not None},
        },
    )


def _problem(row: Row, prompt_id: str, *, source: str, identity: str) -> Prompt:
    meta = other_columns(row, ("problem", "answer", identity))
    return build_prompt(
        prompt_id,
        source=source,
        messages=(Message(role="user", text=_plain(row, "problem")),),
        images=(),
        answer=answer_text(row.get("answer"), "answer"),
        meta={**meta, "question_id": str(row.get(identity, prompt_id))},
    )


def _plain(row: Row, column: str) -> str:
    """The column's text, in which ``<image>`` is a word like others: there are no images."""
    return text_of(row, column).strip().replace(IMAGE_TAG, "image")
