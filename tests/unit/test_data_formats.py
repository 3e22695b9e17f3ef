"""veRL rows become prompts, or are refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mmrl.data.errors import BadRowError
from megatron_mmrl.data.formats import FORMATS
from megatron_mmrl.data.formats.verl import read_verl
from megatron_mmrl.types import Message, Prompt
from tests.unit.data_rows import row


def read(value: dict[str, Any]) -> Prompt:
    return read_verl(value, "train.parquet:3", lambda entry: f"read {entry}".encode())


def test_a_good_row_becomes_a_prompt() -> None:
    value = row("<image>Add <image> them", images=[{"bytes": b"a"}, {"bytes": b"b"}])
    value["prompt"] = [{"role": "system", "content": "Be short."}, *value["prompt"]]
    value["reward_model"]["ground_truth"] = 11
    value["extra_info"] = {"index": 5, "solution": "<answer>11</answer>", "steps": [1, 2], "nothing": None}
    assert read(value) == Prompt(
        id="train.parquet:3",
        source="test",
        messages=(
            Message(role="system", text="Be short."),
            Message(role="user", text="<image>Add <image> them"),
        ),
        images=(b"read {'bytes': b'a'}", b"read {'bytes': b'b'}"),
        answer="11",
        meta={"index": 5, "solution": "<answer>11</answer>", "steps": [1, 2], "ability": "math"},
    )


def test_text_only_rows_need_no_images() -> None:
    value = row("2 + 2?", images=[])
    assert read(value).images == ()
    value["images"] = None
    assert read(value).images == ()


def spoiled(**changes: object) -> dict[str, Any]:
    return {**row(), **changes}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (row(answer=None), "no answer"),
        (row(answer="  "), "no answer"),
        (spoiled(reward_model=None), "no answer"),
        (row("Which digit?"), "0 <image> tags but the row has 1 images"),
        (row("<image><image>Add"), "2 <image> tags but the row has 1 images"),
        (row(images=[]), "1 <image> tags but the row has 0 images"),
        (spoiled(prompt=[]), "prompt is empty"),
        (spoiled(prompt=None), "prompt is empty"),
        (spoiled(prompt="Which digit?"), "prompt is empty"),
        (row("  ", images=[]), "every turn is blank"),
        (spoiled(prompt=[{"role": "tool", "content": "x"}]), "unknown role 'tool'"),
        (spoiled(prompt=["x"]), "unknown role None"),
        (spoiled(prompt=[{"role": "user", "content": None}]), "content of the user turn is NoneType"),
        (spoiled(data_source=None), "data_source"),
        ({}, "data_source"),
    ],
)
def test_bad_rows_are_refused_with_the_reason(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read(value)


def test_formats_are_listed_by_name() -> None:
    assert FORMATS["verl"] is read_verl
