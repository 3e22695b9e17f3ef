"""Log-probs under a repetition penalty, against penalised logits that are written out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mmrl.trainer.logprobs import token_logprobs
from megatron_mmrl.trainer.repetition import repetition_of

VOCAB, PADDED, HIDDEN = 4500, 6000, 8  # three tiles of the vocabulary
PENALTY, TEMPERATURE = 1.3, 0.7
BANNED = torch.tensor([3, 2050])
PROMPTS, RESPONSES = (3, 2, 4), (6, 1, 9)


def micro_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, loss mask and bounds of three packed sequences and padding; responses repeat tokens, also the prompt's."""
    rng = np.random.default_rng(0)
    few = np.array([7, 2049, 4400, 19])  # in every tile
    ids, mask = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids += [*few[:prompt], *([8] * (prompt - 4)), *rng.choice(few, response)]
        mask += [False] * prompt + [True] * response
    ids, mask = ids + [7] * 5, mask + [False] * 5
    lengths = np.add(PROMPTS, RESPONSES)
    return np.array(ids), np.array(mask), np.cumsum([0, *lengths, 5]).astype(np.int32)


def layer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = sum(RESPONSES)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), upstream.to(dtype)


def written_out(penalty: float) -> list[Tensor]:
    """Log-probs, entropy and both gradients from whole logits, row by row."""
    ids, mask, bounds = micro_batch()
    hidden, weight, upstream = layer()
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight[:VOCAB].t()
    keep = torch.ones(VOCAB, dtype=torch.bool)
    keep[BANNED] = False
    values, row = [], 0
    for begin, end in pairwise(bounds):
        past: list[int] = []
        for token in ids[begin:end][mask[begin:end]]:
            z = logits[row].clone()
            for seen in set(past):
                z[seen] = z[seen] * penalty if z[seen] < 0 else z[seen] / penalty
            logp = torch.log_softmax((z / TEMPERATURE)[keep], dim=0)
            values.append(torch.stack([logp[int(keep[:token].sum())], -(logp.exp() * logp).sum()]))
            past.append(int(token))
            row += 1
    stacked = torch.stack(values, dim=1)
    (stacked * upstream).sum().backward()
    return [*stacked.detach(), hidden.grad, weight.grad]


def computed(
    penalty: float, own: np.ndarray | None = None, dtype: torch.dtype = torch.float64, chunk_tokens: int = 4
) -> list[Tensor]:
    """The same as the trainer computes it; ``own``: the loss tokens that this rank has."""
    ids, mask, bounds = micro_batch()
    own = np.arange(sum(RESPONSES)) if own is None else own
    hidden, weight, upstream = layer(dtype)
    hidden, upstream = hidden[own].requires_grad_(), upstream[:, own]
    weight.requires_grad_()
    repetition = repetition_of(ids, mask, bounds, own, penalty=penalty, device=torch.device("cpu"))
    values = token_logprobs(
        hidden,
        weight,
        torch.from_numpy(ids[mask][own]),
        vocab_start=0,
        temperature=TEMPERATURE,
        banned=BANNED,
        vocab_size=VOCAB,
        group=None,
        chunk_tokens=chunk_tokens,
        repetition=repetition,
    )
    (torch.stack(values) * upstream).sum().backward()
    return [*(value.detach() for value in values), hidden.grad, weight.grad]


@pytest.mark.parametrize("penalty", [PENALTY, 0.8])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
def test_values_and_gradients_are_those_of_penalised_logits(penalty: float, chunk_tokens: int) -> None:
    for ours, expected in zip(computed(penalty, chunk_tokens=chunk_tokens), written_out(penalty), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_penalty_does_something_and_only_to_what_was_said() -> None:
    with_penalty, without = computed(PENALTY)[0], computed(1.0)[0]
    first_rows = np.cumsum((0, *RESPONSES))[:-1]  # nothing lies behind the first token; the prompt does not count
    assert torch.equal(with_penalty[first_rows], without[first_rows])
    later = np.setdiff1d(np.arange(sum(RESPONSES)), first_rows)
    assert (with_penalty[later] != without[later]).all()


def test_penalty_one_is_no_penalty() -> None:
    ids, mask, bounds = micro_batch()
    own = np.arange(sum(RESPONSES))
    assert repetition_of(ids, mask, bounds, own, penalty=1.0, device=torch.device("cpu")) is None


def test_a_rank_with_some_of_the_tokens_knows_what_lies_before_them() -> None:
    """Context parallelism: each rank has pieces of every sequence."""
    whole = computed(PENALTY)
    parts = [np.array([0, 1, 5, 6, 7, 8, 14, 15]), np.array([2, 3, 4, 9, 10, 11, 12, 13])]
    weight_gradients = []
    for own in parts:
        logprobs, entropy, hidden, weight = computed(PENALTY, own)
        torch.testing.assert_close(logprobs, whole[0][own])
        torch.testing.assert_close(entropy, whole[1][own])
        torch.testing.assert_close(hidden, whole[2][own])
        weight_gradients.append(weight)
    torch.testing.assert_close(sum(weight_gradients), whole[3])


def test_bfloat16_weights() -> None:
    ours, expected = computed(PENALTY, dtype=torch.bfloat16), written_out(PENALTY)
    assert ours[0].dtype == torch.float32
    assert (ours[0] - expected[0]).abs().max() < 0.1
    assert (ours[2] - expected[2]).abs().max() < 0.05 * expected[2].abs().max()
