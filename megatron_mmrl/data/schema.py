"""The one parquet schema that ``mmrl data prepare`` writes: veRL's, with the columns of ``extra_info`` named.

docs/data.md describes every column. ``formats/verl.py`` reads it back: prompt, images, answer and meta as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_mmrl.types import IMAGE_TAG, Prompt

_EXTRA = pa.struct(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("index", pa.int64()),
        ("answer", pa.string()),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("subject", pa.string()),
        ("level", pa.string()),
        ("columns", pa.string()),
    ]
)
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(_IMAGE)),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", _EXTRA),
    ]
)
# Pictures are compressed already; a dictionary or the least and greatest of them would only cost time.
WRITER = {"compression": {"images.list.element.bytes": "NONE"}, "use_dictionary": False, "write_statistics": False}
_OWN = ("question_id", "choices", "subject", "level", "ability")  # keys of meta that have columns


def to_row(prompt: Prompt, question: str) -> dict[str, object]:
    """One row of ``SCHEMA``; ``split`` and ``index`` are null until the rows are split (``place``).

    Args:
        prompt: with the template baked in or not.
        question: the text that was asked, before any template.
    """
    meta = prompt.meta
    packed = {key: value for key, value in meta.items() if key not in _OWN}
    packed |= {key: meta[key] for key in ("subject", "level") if not isinstance(meta.get(key), str | None)}
    choices = meta.get("choices")
    return {
        "data_source": prompt.source,
        "prompt": [{"role": message.role, "content": message.text} for message in prompt.messages],
        "images": [{"bytes": image, "path": None} for image in prompt.images],
        "ability": str(meta.get("ability") or "math"),
        "reward_model": {"style": "rule", "ground_truth": prompt.answer},
        "extra_info": {
            "id": _text(meta.get("question_id")) or prompt.id,
            "answer": prompt.answer,
            "question": question,
            "choices": [str(choice) for choice in choices] if isinstance(choices, list) else None,
            "subject": _text(meta.get("subject")),
            "level": _text(meta.get("level")),
            "columns": _pack(packed),
        },
    }


def record_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """``rows`` of ``to_row`` in ``SCHEMA``, less than 2 GiB of images."""
    columns = {field.name: [row[field.name] for row in rows] for field in SCHEMA}
    images = _image_column(columns.pop("images"))
    arrays = {name: pa.array(column, SCHEMA.field(name).type) for name, column in columns.items()}
    return pa.RecordBatch.from_arrays([{"images": images, **arrays}[name] for name in SCHEMA.names], schema=SCHEMA)


def question_of(prompt: Prompt) -> str:
    """What the users' turns ask, without image tags."""
    return "\n".join(
        message.text.replace(IMAGE_TAG, "").strip() for message in prompt.messages if message.role == "user"
    )


def place(rows: pa.Table, split: str, first_index: int) -> pa.Table:
    """``rows`` with ``extra_info.split`` and a running ``extra_info.index`` filled in.

    Made of buffers: ``pa.array`` and ``set_column`` first import pandas, to ask whether they were given a Series.
    """
    extra = rows["extra_info"].combine_chunks()
    columns = {field.name: extra.field(number) for number, field in enumerate(_EXTRA)}
    ends = np.arange(len(rows) + 1, dtype=np.int32) * len(split)
    columns["split"] = pa.StringArray.from_buffers(
        len(rows), pa.py_buffer(ends), pa.py_buffer(split.encode() * len(rows))
    )
    numbers = np.arange(first_index, first_index + len(rows), dtype=np.int64)
    columns["index"] = pa.Int64Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(numbers)])
    filled = pa.StructArray.from_arrays(list(columns.values()), fields=list(_EXTRA))
    arrays = [pa.chunked_array([filled]) if name == "extra_info" else rows[name] for name in SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _image_column(column: Sequence[Sequence[Mapping[str, bytes]]]) -> pa.ListArray:
    """What ``pa.array`` would make of it, the bytes copied once."""
    files = [image["bytes"] for images in column for image in images]
    ends = np.cumsum([0, *map(len, files)], dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(files))]
    data = pa.BinaryArray.from_buffers(pa.binary(), len(files), buffers)
    pictures = pa.StructArray.from_arrays([data, pa.nulls(len(files), pa.string())], fields=list(_IMAGE))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, column)], dtype=np.int32)), pictures)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _pack(values: Mapping[str, object]) -> str | None:
    return json.dumps(values, ensure_ascii=False, sort_keys=True) if values else None
