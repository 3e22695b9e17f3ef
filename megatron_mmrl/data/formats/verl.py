"""veRL's schema, and the superset of it that ``mmrl data prepare`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats.row import ReadImage, Row, answer_text, as_json, build_prompt, read_messages
from megatron_mmrl.types import Prompt

_COLUMNS = "columns"  # of extra_info: a JSON object with what the schema has no column for
_TYPED = ("subject", "level")  # columns of text; a source's number is kept in the JSON object


def read_verl(row: Row, prompt_id: str, read_image: ReadImage) -> Prompt:
    """veRL's schema.

    ``{data_source: str, prompt: [{role, content}], images: [{bytes} | {path}], ability: str,
    reward_model: {style, ground_truth}, extra_info: {...}}``; ``content`` holds one ``<image>`` tag per image.
    The columns of ``extra_info``, those in its JSON object ``columns``, and ``ability`` become ``Prompt.meta``
    (``extra_info.solution`` is the target of supervised training; ``extra_info.id`` is ``question_id`` too).

    Raises:
        BadRowError: no prompt or answer, unknown role, tags and images that do not agree, an image that ``read_image``
            refuses.
    """
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise BadRowError(f"data_source is {source!r}; it must name the data set")
    entries = row.get("images")
    reward_model = row.get("reward_model")
    answer = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    return build_prompt(
        prompt_id,
        source=source,
        messages=read_messages(row.get("prompt")),
        images=[read_image(entry) for entry in entries] if isinstance(entries, Sequence) else [],
        answer=answer_text(answer, "reward_model.ground_truth"),
        meta=_meta(row),
    )


def _meta(row: Row) -> dict[str, object]:
    extra = row.get("extra_info")
    values = dict(extra) if isinstance(extra, Mapping) else {}
    packed = _packed(values.pop(_COLUMNS, None))
    values = {**packed, **{key: item for key, item in values.items() if item is not None}}
    values |= {key: packed[key] for key in _TYPED if key in packed}
    if row.get("ability") is not None:
        values.setdefault("ability", row["ability"])
    if values.get("id") is not None:
        values.setdefault("question_id", values["id"])
    return {str(key): as_json(value) for key, value in values.items() if value is not None}


def _packed(columns: object) -> dict[str, object]:
    """The JSON object of ``extra_info.columns``; anything else under that name is a column like others."""
    if not isinstance(columns, str):
        return {} if columns is None else {_COLUMNS: columns}
    try:
        values = json.loads(columns)
    except ValueError:
        values = None
    return values if isinstance(values, dict) else {_COLUMNS: columns}
