"""MM-Eureka's jsonl in both of its schemas, told apart by their columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats.row import (
    ReadImage,
    Row,
    answer_text,
    build_prompt,
    image_entries,
    other_columns,
    read_messages,
    with_tags,
    without_reply,
)
from megatron_mmrl.types import IMAGE_TAG, Prompt

_USED = ("id", "conversations", "message", "answer", "image_urls")


def read_mm_eureka(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """``{id, conversations: [{role, content}], answer, image_urls: [path]}`` or ``{id, message, answer}``.

    ``message`` is the JSON text of a chat whose content is text or parts ``{type: image, image: "file://..."}`` and
    ``{type: text, text}``. An assistant's turn at the end is not part of the prompt; it becomes ``meta["solution"]``.

    Raises:
        BadRowError: neither schema, no answer, tags and images that do not agree, an image that ``read_image`` refuses.
    """
    turns: object
    if "message" in row:
        turns, entries = _parse_message(row["message"])
    elif "conversations" in row:
        turns, entries = row["conversations"], image_entries(row.get("image_urls"))
    else:
        raise BadRowError(f"neither 'conversations' nor 'message' among the columns {', '.join(map(str, row))}")
    messages, reply = without_reply(read_messages(turns))
    meta = {"question_id": row.get("id"), "solution": reply}
    return build_prompt(
        prompt_id,
        source="mm_eureka",
        messages=with_tags(messages, len(entries)),
        images=[read_image(entry) for entry in entries],
        answer=answer_text(row.get("answer"), "answer"),
        meta={**{key: value for key, value in meta.items() if value is not None}, **other_columns(row, _USED)},
    )


def _parse_message(message: object) -> tuple[list[object], list[object]]:
    """Turns with tags where the images stand, and the images in that order."""
    try:
        turns = json.loads(message) if isinstance(message, str) else message
    except ValueError as error:
        raise BadRowError(f"'message' is not JSON: {error}") from error
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRowError(f"'message' holds {type(turns).__name__}, not a list of turns")
    flat: list[object] = []
    entries: list[object] = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(content, list):
            flat.append(turn)
            continue
        text, images = _flatten(content)
        flat.append({"role": turn.get("role"), "content": text})
        entries += images
    return flat, entries


def _flatten(parts: list[object]) -> tuple[str, list[object]]:
    text, images = "", []
    for part in parts:
        fields: Mapping[str, object] = part if isinstance(part, Mapping) else {}
        kind, words = fields.get("type"), fields.get("text")
        if kind == "text" and isinstance(words, str):
            text += words
        elif kind == "image":
            text += IMAGE_TAG
            images += image_entries(fields.get("image"))
        else:
            raise BadRowError(f"a part of 'message' has type {kind!r}; known: text, image")
    return text, images
