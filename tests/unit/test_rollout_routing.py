"""Which rank leads which engine, which prompts it gets, how weights are cut into buckets."""

from __future__ import annotations

import pytest
import torch

from megatron_mmrl.rollout.fleet import buckets
from megatron_mmrl.rollout.routing import leader_ranks, shares


@pytest.mark.parametrize(
    ("num_engines", "world_size", "expected"),
    [(1, 1, (0,)), (1, 4, (0,)), (2, 4, (0, 2)), (4, 4, (0, 1, 2, 3)), (2, 6, (0, 3))],
)
def test_leaders_are_the_first_of_equal_runs_of_ranks(num_engines, world_size, expected):
    assert leader_ranks(num_engines, world_size) == expected


def test_engines_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ValueError, match=r"num_engines=3 does not divide the 4"):
        leader_ranks(3, 4)


def test_shares_by_hand():
    assert shares(10, 4) == (slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10))
    assert shares(2, 3) == (slice(0, 1), slice(1, 2), slice(2, 2))


@pytest.mark.parametrize("num_prompts", [0, 1, 7, 16, 33])
@pytest.mark.parametrize("num_engines", [1, 2, 3, 8])
def test_shares_cover_every_prompt_once_and_are_balanced(num_prompts, num_engines):
    prompts = list(range(num_prompts))
    parts = [prompts[share] for share in shares(num_prompts, num_engines)]
    assert [prompt for part in parts for prompt in part] == prompts
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_buckets_keep_order_and_limit_and_let_a_large_tensor_travel_alone():
    sizes = {"a": 2, "b": 3, "c": 9, "d": 1, "e": 4}  # float32: 4 bytes each
    named = [(name, torch.zeros(size)) for name, size in sizes.items()]
    assert [[name for name, _ in bucket] for bucket in buckets(named, 20)] == [["a", "b"], ["c"], ["d", "e"]]
