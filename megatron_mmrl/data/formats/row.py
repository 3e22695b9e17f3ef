"""What the readers of rows share: columns checked, each with the reason that a row is refused for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.types import IMAGE_TAG, Message, Prompt

Row = Mapping[str, object]
"""One row as plain Python values."""
ReadImage = Callable[[object], bytes]
"""An entry ``{bytes}`` or ``{path}`` -> the encoded file. Raises BadRowError."""
ReadRow = Callable[[Row, str, ReadImage], Prompt]
"""(row, prompt id, read_image) -> prompt. Raises BadRowError."""

_ROLES = ("system", "user", "assistant")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def build_prompt(
    prompt_id: str,
    *,
    source: str,
    messages: tuple[Message, ...],
    images: Sequence[bytes],
    answer: str,
    meta: Mapping[str, object],
) -> Prompt:
    """A prompt whose ``<image>`` tags were counted.

    Raises:
        BadRowError: tags that are not as many as the images, text that UTF-8 has no bytes for.
    """
    texts = [message.text for message in messages]
    try:
        json.dumps([*texts, answer, meta], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"the text holds half a character, {error.object[error.start]!r}: it is no UTF-8") from error
    tags = sum(text.count(IMAGE_TAG) for text in texts)
    if tags != len(images):
        raise BadRowError(f"the prompt has {tags} {IMAGE_TAG} tags but the row has {len(images)} images")
    return Prompt(id=prompt_id, source=source, messages=messages, answer=answer, meta=meta, images=tuple(images))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a row of one question about pictures holds, found in its columns."""

    source: str
    text: str
    answer: str
    image: object
    """The column's value: none, one or several of ``{bytes, path}``, bytes or a path."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """Keys with a meaning of their own (``choices``, ``subject``, ``level``, ``question_id``); None is dropped."""
    used: tuple[str, ...] = ()
    """Columns that the fields above stand for; the others are added to ``Prompt.meta``."""


def question_prompt(row: Row, prompt_id: str, read_image: ReadImage, question: Question) -> Prompt:
    """One user's turn; tags that the text lacks go before it. Raises BadRowError."""
    images = [read_image(entry) for entry in image_entries(question.image)]
    text = question.text if IMAGE_TAG in question.text else IMAGE_TAG * len(images) + question.text
    named = {key: as_json(value) for key, value in question.meta.items() if value is not None}
    return build_prompt(
        prompt_id,
        source=question.source,
        messages=(Message(role="user", text=text),),
        images=images,
        answer=question.answer,
        meta={**other_columns(row, question.used), **named},
    )


def read_messages(turns: object) -> tuple[Message, ...]:
    """Chat turns ``[{role, content: str}]``. Raises BadRowError: none, unknown role, content that is not text."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRowError("prompt is empty; it must be a list of {role, content}")
    messages = []
    for turn in turns:
        role, text = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in _ROLES:
            raise BadRowError(f"unknown role {role!r} in prompt; known: {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise BadRowError(f"content of the {role} turn is {type(text).__name__}, not text")
        messages.append(Message(role=role, text=text))
    if not any(message.text.strip() for message in messages):
        raise BadRowError("prompt is empty: every turn is blank")
    return tuple(messages)


def without_reply(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """The conversation up to the last assistant's turn at its end, and that turn: a written solution, not a prompt."""
    if messages[-1].role != "assistant":
        return messages, None
    if len(messages) == 1:
        raise BadRowError("the conversation has nothing but an assistant's turn")
    return messages[:-1], messages[-1].text


def with_tags(messages: tuple[Message, ...], num_images: int) -> tuple[Message, ...]:
    """``messages``; where no turn has an ``<image>`` tag, one per image before the first user's turn."""
    if any(IMAGE_TAG in message.text for message in messages):
        return messages
    first = next((number for number, message in enumerate(messages) if message.role == "user"), 0)
    tagged = Message(role=messages[first].role, text=IMAGE_TAG * num_images + messages[first].text)
    return (*messages[:first], tagged, *messages[first + 1 :])


def image_entries(value: object) -> list[object]:
    """The images of a column that may hold none, one or several: ``{bytes, path}``, bare bytes or a bare path each."""
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [_entry(item) for item in values if item is not None]


def text_of(row: Row, column: str) -> str:
    """A column that must hold text. Raises BadRowError."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"column {column!r} is {value!r:.100}; it must hold the question (columns: {_names(row)})")
    return value


def answer_text(value: object, column: str) -> str:
    """A gold answer as text. Raises BadRowError where ``column`` has none."""
    text = "" if value is None else str(value).strip()
    if not text:
        raise BadRowError(f"no answer: {column} is missing or blank")
    return text


def tagged_answer(value: object, column: str) -> str:
    """A gold answer taken out of its last ``<answer>...</answer>``; text without the tags as a whole."""
    found = _ANSWER.findall(text := answer_text(value, column))
    return answer_text(found[-1] if found else text, column)


def other_columns(row: Row, used: Iterable[str]) -> dict[str, object]:
    """The columns that no field of Prompt holds, as JSON values; null and bare bytes are dropped."""
    taken = set(used)
    left = {key: value for key, value in row.items() if key not in taken and value is not None}
    return {str(key): as_json(value) for key, value in left.items() if not _has_bytes(value)}


def as_json(value: object) -> object:
    """``value`` as JSON has it: numbers stay numbers, lists lists; what JSON lacks becomes text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def _entry(value: object) -> object:
    if isinstance(value, bytes):
        return {"bytes": value}
    return {"path": value} if isinstance(value, str) else value


def _has_bytes(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_has_bytes(item) for item in value.values())
    return any(_has_bytes(item) for item in value) if isinstance(value, list | tuple) else isinstance(value, bytes)


def _names(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"
