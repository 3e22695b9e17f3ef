"""Context ranks share out every token once, and read exactly what comes before: by hand and against plain attention."""

from __future__ import annotations

import pytest
import torch

from megatron_mmrl.parallel.attention import pack
from megatron_mmrl.parallel.context import held_tokens
from megatron_mmrl.parallel.rotary import MultimodalRotary, rotate

CPU = torch.device("cpu")


def test_two_ranks_hold_outer_and_inner_chunks_of_every_sequence() -> None:
    bounds = torch.tensor([0, 8, 12])
    assert held_tokens(bounds, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_tokens(bounds, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert held_tokens(bounds, 0, 1).tolist() == list(range(12))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_is_held_once(size: int) -> None:
    bounds = torch.tensor([0, 2, 3, 7, 12]) * 2 * size
    held = [held_tokens(bounds, rank, size) for rank in range(size)]
    assert {len(tokens) for tokens in held} == {24}
    assert sorted(torch.cat(held).tolist()) == list(range(24 * size))


def test_every_rank_has_the_same_causal_work() -> None:
    """Keys that a rank's queries read, of a sequence of 24: the same on each of 4 ranks."""
    work = {int((held_tokens(torch.tensor([0, 24]), rank, 4) + 1).sum()) for rank in range(4)}
    assert work == {24 * 25 // 2 // 4}


def test_a_sequence_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at tokens 4:10 is 6 long, which context_parallel_size=2 .* multiple of 4"):
        pack(torch.tensor([0, 4, 10]), CPU, rank=0, size=2)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_packed_rows_read_their_own_sequence_up_to_themselves(size: int) -> None:
    """For each held token, the set of tokens that it reads."""
    bounds = torch.tensor([0, 1, 4, 6, 7]) * 2 * size
    gathered = torch.cat([held_tokens(bounds, rank, size) for rank in range(size)])
    for rank in range(size):
        described = pack(bounds, CPU, rank=rank, size=size)
        reads = []
        for rows in described.rows:
            longest = rows.keys.shape[1]
            causal = torch.ones(longest, longest, dtype=torch.bool).tril()
            masks = causal.expand(len(rows.keys), -1, -1) if rows.mask is None else rows.mask[:, 0]
            reads += [
                sorted(set(gathered[keys[query]].tolist()))
                for keys, mask in zip(rows.keys, masks, strict=True)
                for query in mask
            ]
        for token, place in zip(described.held.tolist(), described.places.tolist(), strict=True):
            start = int(bounds[bounds <= token].max())
            assert reads[place] == list(range(start, token + 1))


def test_rotation_turns_pairs_by_their_axis() -> None:
    """Head dimension 6 at base 1: frequency 1 for each of the three pairs, one each by t, h and w."""
    rotary = MultimodalRotary(6, 1.0)
    quarter = torch.pi / 2
    rotary._inverse_frequencies = torch.full((3,), quarter)  # position 1 is a quarter turn
    turns = rotary(torch.tensor([1, 2, 0]).view(3, 1, 1), (1, 1, 1))
    x = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 1, 1, 6)
    torch.testing.assert_close(rotate(x, turns).flatten(), torch.tensor([-4.0, -2, 3, 1, -5, 6]))
