"""ms-swift's rows: messages, images and solution, with any other column kept for the rewards."""

from __future__ import annotations

from megatron_mmrl.data.formats.row import (
    ReadImage,
    Row,
    build_prompt,
    image_entries,
    other_columns,
    read_messages,
    tagged_answer,
    with_tags,
    without_reply,
)
from megatron_mmrl.types import Prompt


def read_swift(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """``{messages: [{role, content}], images: [{bytes, path}] | [path], solution: str, ...}``.

    The answer is what stands in the tags of ``<answer> 3 </answer>``; ``solution`` as it is, and every other column,
    are in ``meta``. Without a ``solution`` the assistant's turn at the end is it. Tags that the text lacks go before
    the first user's turn.

    Raises:
        BadRowError: no messages or answer, tags and images that do not agree, an image that ``read_image`` refuses.
    """
    messages, reply = without_reply(read_messages(row.get("messages")))
    solution = reply if row.get("solution") is None else row["solution"]
    images = [read_image(entry) for entry in image_entries(row.get("images"))]
    return build_prompt(
        prompt_id,
        source=str(row.get("data_source") or "swift"),
        messages=with_tags(messages, len(images)),
        images=images,
        answer=tagged_answer(solution, "solution"),
        meta={**other_columns(row, ("messages", "images", "data_source")), "solution": str(solution)},
    )
