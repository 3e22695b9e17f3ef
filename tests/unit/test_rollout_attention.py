"""Attention of the last token of many sequences at once = SDPA of each sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mmrl.rollout import batched_attention
from megatron_mmrl.rollout.batched_attention import attend_last_tokens

LENGTHS = (1, 5, 16, 17, 40)
KV_HEADS, HEADS, SIZE = 2, 6, 8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(200, KV_HEADS, SIZE, generator=generator) for _ in range(2))
    query = torch.randn(len(LENGTHS), HEADS, SIZE, generator=generator)
    slots = torch.randint(0, 200, (len(LENGTHS), max(LENGTHS)), generator=generator, dtype=torch.int32)
    return query, (keys, values), slots, torch.tensor(LENGTHS)


def alone(query, caches, slots, scale):
    keys, values = (cache[slots.long()].transpose(0, 1)[None] for cache in caches)
    return scaled_dot_product_attention(query[None, :, None], keys, values, scale=scale, enable_gqa=True)[0, :, 0]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_each_sequence_alone(problem, scale):
    query, caches, slots, lengths = problem
    expected = torch.stack([alone(query[i], caches, slots[i, :n], scale) for i, n in enumerate(LENGTHS)])
    assert (attend_last_tokens(query, caches, slots, lengths, scale) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("longest", [50, 700])
def test_a_row_is_the_same_in_any_company(problem, longest):
    query, caches, _, _ = problem
    generator = torch.Generator().manual_seed(1)
    slots = torch.randint(0, 200, (len(query), longest), generator=generator)
    lengths = torch.tensor([7, longest, 33, 48, 20])
    together = attend_last_tokens(query, caches, slots, lengths)
    for row in range(len(query)):
        alone = attend_last_tokens(
            query[row : row + 1], caches, slots[row : row + 1, : lengths[row]], lengths[row : row + 1]
        )
        assert torch.equal(together[row], alone[0])


def test_what_is_past_a_length_is_never_read(problem):
    query, caches, slots, lengths = problem
    expected = attend_last_tokens(query, caches, slots, lengths)
    for i, length in enumerate(LENGTHS):
        slots[i, length:] = 199
    for cache in caches:
        cache[199] = float("nan")
    kept = [i for i, length in enumerate(LENGTHS) if 199 not in slots[i, :length]]
    assert kept
    assert torch.equal(attend_last_tokens(query, caches, slots, lengths)[kept], expected[kept])


def test_cutting_the_batch_changes_nothing(problem, monkeypatch):
    query, caches, slots, lengths = problem
    expected = attend_last_tokens(query, caches, slots, lengths)
    monkeypatch.setattr(batched_attention, "_MAX_SLOTS", 16)  # one row at a time
    assert (attend_last_tokens(query, caches, slots, lengths) - expected).abs().max() < 1e-6
