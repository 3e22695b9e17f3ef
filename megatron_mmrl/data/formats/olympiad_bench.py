"""OlympiadBench (``Hothan/OlympiadBench``): problems of olympiads with one or several final answers and a tolerance."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats.row import ReadImage, Row, build_prompt, image_entries, other_columns, text_of
from megatron_mmrl.types import IMAGE_TAG, Message, Prompt

_COLUMNS = tuple(f"image_{number}" for number in range(1, 10))
_TAG = re.compile(r"<image_(\d)>")
_USED = ("question", "context", "final_answer", "images", "error", "id", *_COLUMNS)


def read_olympiad_bench(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """``{id, question, context, final_answer: [str], image_1 .. image_9 (or images), error, unit, answer_type,
    is_multiple_answer, subfield, subject, language, ...}``.

    ``context`` stands before the question. ``<image_n>`` becomes ``<image>`` where it first stands and the words
    "image n" where it stands again; an image that no text names goes to the front. ``meta["answers"]`` holds the final
    answers, ``meta["tolerance"]`` what ``error`` says (a number, or one for each answer).

    Raises:
        BadRowError: no question, no final answer (problems that ask for a proof), a tag without its image.
    """
    question = text_of(row, "question")
    answers = [text.strip() for text in _strings(row.get("final_answer")) if text.strip()]
    if not answers:
        raise BadRowError("no answer: final_answer is missing or blank (a problem that asks for a proof)")
    context = row.get("context")
    text = f"{context.strip()}\n\n{question}" if isinstance(context, str) and context.strip() else question
    text, images = place_images(text, _images(row))
    meta = other_columns(row, _USED) | {"answers": answers, "question_id": str(row.get("id") or prompt_id)}
    tolerance = _tolerance(row.get("error"))
    if tolerance:
        meta["tolerance"] = tolerance[0] if len(tolerance) == 1 else tolerance
    return build_prompt(
        prompt_id,
        source="olympiad_bench",
        messages=(Message(role="user", text=text),),
        images=[read_image(image) for image in images],
        answer=", ".join(answers),
        meta=meta,
    )


def place_images(text: str, images: Sequence[tuple[int, object]]) -> tuple[str, list[object]]:
    """The text with ``<image>`` tags, and the images in the order of their tags.

    Args:
        text: with tags ``<image_n>``.
        images: (n, image), in order.

    Raises:
        BadRowError: the text names an image that there is not.
    """
    known = dict(images)
    named = list(dict.fromkeys(int(number) for number in _TAG.findall(text)))
    if missing := [number for number in named if number not in known]:
        raise BadRowError(f"the question names image {missing[0]}, but the row has only {sorted(known)}")
    seen: set[int] = set()

    def tag(match: re.Match[str]) -> str:
        number = int(match.group(1))
        first = number not in seen
        seen.add(number)
        return IMAGE_TAG if first else f"image {number}"

    ahead = [number for number, _ in images if number not in named]
    return IMAGE_TAG * len(ahead) + _TAG.sub(tag, text), [known[number] for number in ahead + named]


def _images(row: Row) -> list[tuple[int, object]]:
    listed = image_entries(row.get("images"))
    if listed:
        return list(enumerate(listed, start=1))
    return [(number, row[name]) for number, name in enumerate(_COLUMNS, start=1) if row.get(name) is not None]


def _strings(value: object) -> list[str]:
    items = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in items if item is not None]


def _tolerance(error: object) -> list[float]:
    """``error`` is empty, a number such as ``1e-1``, or several with commas between. Raises BadRowError otherwise."""
    parts = [part for part in str("" if error is None else error).split(",") if part.strip()]
    try:
        return [float(part) for part in parts]
    except ValueError as problem:
        raise BadRowError(f"error is {error!r}; it must be a number, or numbers with commas between") from problem
