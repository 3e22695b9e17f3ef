"""Log-probs and entropies tile by tile against log_softmax of whole logits, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mmrl.trainer.logprobs import token_logprobs
from tests.unit.logprobs_case import CASES, VOCAB, assert_near, chunked, dense, problem


@pytest.mark.parametrize(("temperature", "ban"), CASES)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_one_rank_equals_log_softmax(dtype: torch.dtype, rel: float, temperature: float, ban: bool):
    expected = dense(temperature, ban)
    for chunk_tokens in (1, 5, 100):
        found = chunked(dtype, temperature, ban, chunk_tokens)
        assert {value.dtype for value in found} == {dtype}
        assert_near(found, expected, rel)


def call(**changes) -> tuple[torch.Tensor, torch.Tensor]:
    given = problem(torch.float32)
    arguments = {
        "hidden": given["hidden"],
        "weight": given["weight"],
        "targets": given["targets"],
        "vocab_start": 0,
        "temperature": 1.0,
        "banned": None,
        "vocab_size": VOCAB,
        "group": None,
        "chunk_tokens": 4,
    }
    return token_logprobs(**(arguments | changes))


def test_by_hand():
    # logits (0, ln 3) and a padding row: p = (1/4, 3/4); at T = 1/2 the odds are squared: (1/10, 9/10)
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)], [50.0]])
    given = {"hidden": hidden, "weight": weight, "targets": torch.tensor([0, 1]), "vocab_size": 2}
    logprobs, entropy = call(**given)
    assert logprobs.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)])
    assert entropy[0].item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    logprobs, _ = call(**given, temperature=0.5)
    assert logprobs.tolist() == pytest.approx([math.log(0.1), math.log(0.9)])
    logprobs, entropy = call(**given, banned=torch.tensor([1]))
    assert logprobs.tolist() == [0.0, -math.inf]  # what is banned cannot have been drawn
    assert entropy.tolist() == [0.0, 0.0]
    logprobs, _ = call(**(given | {"targets": torch.tensor([2, 1])}))
    assert logprobs.tolist() == pytest.approx([-math.inf, math.log(3 / 4)])  # nor padding


@pytest.mark.parametrize("banned", [range(2048), range(2048, 4096), range(1, 4500)])
def test_a_tile_where_everything_is_banned_changes_nothing(banned: range):
    """Against the same layer without the banned rows; at last one token is left, and it is certain."""
    given, hidden = problem(torch.float32), problem(torch.float32)["hidden"].requires_grad_()
    keep = torch.tensor([token for token in range(VOCAB) if token not in banned])
    targets = torch.arange(len(hidden)) * (len(keep) - 1) // len(hidden)
    whole = call(hidden=hidden, targets=keep[targets], banned=torch.tensor(banned))
    alone = call(hidden=hidden, weight=given["weight"][keep], targets=targets, vocab_size=len(keep))
    results = [
        [*values, *torch.autograd.grad((torch.stack(values) * given["upstream"]).sum(), hidden)]
        for values in (whole, alone)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_logits_far_from_zero_keep_their_precision():
    """A constant added to all logits (a column of ones in the weight) changes no probability."""
    given = problem(torch.float32)
    ones = torch.ones(len(given["weight"]), 1)
    for shift in (-(2.0**9), 2.0**9):
        hidden = torch.cat([given["hidden"], torch.full((len(given["hidden"]), 1), shift)], dim=1)
        shifted = call(hidden=hidden, weight=torch.cat([given["weight"], ones], dim=1))
        for values, expected in zip(shifted, call(), strict=True):
            # float32 logits near 512 are 6e-5 apart: no sum may lose more than they have lost already
            torch.testing.assert_close(values, expected, rtol=0, atol=2e-4)


def test_only_what_needs_a_gradient_gets_one():
    given = problem(torch.float32)
    hidden, frozen = given["hidden"].clone().requires_grad_(), given["weight"]
    logprobs, _ = call(hidden=hidden, weight=frozen)
    logprobs.sum().backward()  # the entropy is not used
    assert hidden.grad.abs().sum() > 0
    assert frozen.grad is None
    weight = given["weight"].clone().requires_grad_()
    _, entropy = call(weight=weight)
    entropy.sum().backward()  # nor here the log-probs
    assert weight.grad[:VOCAB].abs().sum() > 0
    assert weight.grad[VOCAB:].abs().sum() == 0  # padding learns nothing


def test_an_unused_entropy_is_an_entropy_of_slope_zero():
    gradients = []
    for entropy_slope in (None, 0.0):
        hidden = problem(torch.float32)["hidden"].requires_grad_()
        logprobs, entropy = call(hidden=hidden)
        loss = logprobs.sum() if entropy_slope is None else logprobs.sum() + entropy_slope * entropy.sum()
        gradients += torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_a_micro_batch_without_loss_tokens_gives_a_zero_gradient():
    given = problem(torch.float32)
    hidden, weight = given["hidden"][:0].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    logprobs, _ = call(hidden=hidden, weight=weight, targets=given["targets"][:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_inputs_give_float32_values():
    given = problem(torch.bfloat16)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    values = call(hidden=hidden, weight=weight)
    (torch.stack(values) * given["upstream"]).sum().backward()
    assert {value.dtype for value in values} == {torch.float32}
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert_near([*(value.detach() for value in values), hidden.grad, weight.grad], dense(1.0, ban=False), 2e-2)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        call(temperature=0.0)
    with pytest.raises(ValueError, match="13 rows of hidden states but 12 targets"):
        call(targets=problem(torch.float32)["targets"][:12])
