"""How a row of a data file becomes a Prompt: one pure function per format, listed in FORMATS."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.types import IMAGE_TAG, Message, Prompt

Row = Mapping[str, object]
ReadImage = Callable[[object], bytes]
_ROLES = ("system", "user", "assistant")


def read_verl(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """veRL's schema.

    ``{data_source: str, prompt: [{role, content}], images: [{bytes} | {path}], ability: str,
    reward_model: {style, ground_truth}, extra_info: {...}}``; ``content`` holds one ``<image>`` tag per image.
    The columns of ``extra_info``, and ``ability``, become ``Prompt.meta`` as strings
    (``extra_info.solution`` is the target of supervised training).

    Raises:
        BadRowError: no prompt or answer, unknown role, tags and images that do not agree, an image that ``read_image``
            refuses.
    """
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise BadRowError(f"data_source is {source!r}; it must name the data set")
    messages = _messages(row.get("prompt"))
    entries = row.get("images")
    entries = list(entries) if isinstance(entries, Sequence) else []
    tags = sum(message.text.count(IMAGE_TAG) for message in messages)
    if tags != len(entries):
        raise BadRowError(f"the prompt has {tags} {IMAGE_TAG} tags but the row has {len(entries)} images")
    return Prompt(
        id=prompt_id,
        source=source,
        messages=messages,
        answer=_answer(row.get("reward_model")),
        meta=_meta(row),
        images=tuple(read_image(entry) for entry in entries),
    )


FORMATS: Mapping[str, Callable[[Row, str, ReadImage], Prompt]] = {"verl": read_verl}
"""``data.format`` -> reader. A new format is one more function here."""


def _messages(turns: object) -> tuple[Message, ...]:
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


def _answer(reward_model: object) -> str:
    answer = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    text = "" if answer is None else str(answer).strip()
    if not text:
        raise BadRowError("no answer: reward_model.ground_truth is missing or blank")
    return text


def _meta(row: Row) -> dict[str, str]:
    extra = row.get("extra_info")
    columns = dict(extra) if isinstance(extra, Mapping) else {}
    if row.get("ability") is not None:
        columns.setdefault("ability", row["ability"])
    return {str(key): _as_text(value) for key, value in columns.items() if value is not None}


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | list | dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
