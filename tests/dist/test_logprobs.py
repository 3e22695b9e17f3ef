"""Log-probs and entropies with the vocabulary on several ranks, and the memory that they take."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.logprobs import Case, extra_bytes
from tests.dist.launch import run_ranks
from tests.unit.logprobs_case import CASES, assert_near, chunked, dense


def on_rank(size: int) -> list[list[torch.Tensor]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    results = [
        chunked(dtype, *case, chunk_tokens=5, rank=rank, size=size, group=dist.group.WORLD)
        for case in CASES
        for dtype in (torch.float64, torch.float32)
    ]
    dist.destroy_process_group()
    return [[value.numpy() for value in result] for result in results]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_log_softmax(size: int):
    ranks = [[[torch.from_numpy(v) for v in result] for result in rank] for rank in run_ranks(on_rank, size, size)]
    for index, (case, rel) in enumerate((case, rel) for case in CASES for rel in (1e-13, 1e-5)):
        logprobs, entropy, hidden, weight = zip(*(rank[index] for rank in ranks), strict=True)
        for values in (logprobs, entropy):
            assert all(torch.equal(value, values[0]) for value in values)
        # each rank holds its part of the hidden gradient and its own rows of the weight's
        assert_near([logprobs[0], entropy[0], sum(hidden), torch.cat(weight)], dense(*case), rel)


def test_memory_is_a_sixteenth_of_the_logits():
    case = Case(hidden=64, vocab=32768, tokens=1024, share=1.0, kind="train+entropy", chunk_tokens=128)
    logits_bytes = case.tokens * case.vocab * 4
    assert extra_bytes(case, "materialised") > logits_bytes  # the measurement sees logits where there are some
    assert extra_bytes(case, "chunked") < logits_bytes / 16
