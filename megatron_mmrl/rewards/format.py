"""Whether a response has the shape ``<think>...</think> <answer>...</answer>``."""

from __future__ import annotations

import re

from megatron_mmrl.types import Prompt

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def think_answer_format(prompt: Prompt, response_text: str) -> float:
    """1.0 when the whole response is one think block, then one answer block, else 0.0.

    Each tag stands exactly once; only white space may stand between, before and after the blocks. What is inside
    them does not matter here.
    """
    if any(response_text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    return float(_SHAPE.fullmatch(response_text) is not None)
