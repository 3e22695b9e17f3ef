"""A real SGLang on the GPU, with CUDA graphs, whose weights are the trainer's memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.reshard_engine import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_answers_are_equal_to_the_bit_whichever_way_weights_come() -> None:
    speed = measure("cuda", rounds=2)  # raises where an answer or a log-prob changes
    assert speed.shared_bytes > speed.copied_bytes  # only QKV and the vision tower lie differently
