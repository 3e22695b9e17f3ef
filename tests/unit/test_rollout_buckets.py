"""Weights travel in buckets of bounded size."""

import torch

from megatron_mmrl.rollout.fleet import buckets


def test_buckets_keep_order_and_size_and_a_large_tensor_comes_alone() -> None:
    sizes = {"a": 4, "b": 6, "c": 5, "d": 30, "e": 1, "f": 9}
    tensors = [(name, torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()]
    assert [[name for name, _ in bucket] for bucket in buckets(tensors, 10)] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_nothing_makes_no_bucket() -> None:
    assert list(buckets([], 10)) == []
