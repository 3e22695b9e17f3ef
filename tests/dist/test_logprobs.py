"""Vocab-parallel, chunked log-probs and entropies against log_softmax of whole logits, values and gradients."""

from __future__ import annotations

import math
import os

import pytest
import torch
from tests.dist.launch import run_ranks

from megatron_mmrl.trainer.logprobs import token_logprobs

ROWS, HIDDEN, VOCAB, PADDED = 13, 16, 42, 48
BANNED = torch.tensor([0, 5, 23, 24, 41])
CASES = [(1.0, False), (0.7, True), (2.5, True)]


def problem(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([v for v in range(VOCAB) if v not in BANNED])
    return {
        "hidden": torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype),
        "weight": torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64).to(dtype),
        "targets": allowed[torch.randint(len(allowed), (ROWS,), generator=generator)],
        "upstream": torch.randn(2, ROWS, generator=generator, dtype=torch.float64).to(dtype),
    }


def dense(temperature: float, ban: bool) -> list[torch.Tensor]:
    """Log-probs, entropy and the gradients of hidden and weight, in float64 with whole logits."""
    given = problem(torch.float64)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    keep = torch.arange(PADDED) < VOCAB
    if ban:
        keep[BANNED] = False
    logp = torch.log_softmax((hidden @ weight.t() / temperature)[:, keep], dim=-1)
    column = torch.cumsum(keep, 0)[given["targets"]] - 1
    logprobs, entropy = logp.gather(1, column[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)
    (torch.stack([logprobs, entropy]) * given["upstream"]).sum().backward()
    return [logprobs.detach(), entropy.detach(), hidden.grad, weight.grad]


def chunked(
    dtype: torch.dtype, temperature: float, ban: bool, chunk_tokens: int, rank: int = 0, size: int = 1, group=None
) -> list[torch.Tensor]:
    given, rows = problem(dtype), PADDED // size
    hidden = given["hidden"].requires_grad_()
    weight = given["weight"][rank * rows : (rank + 1) * rows].clone().requires_grad_()
    values = token_logprobs(
        hidden,
        weight,
        given["targets"],
        vocab_start=rank * rows,
        temperature=temperature,
        banned=BANNED if ban else None,
        vocab_size=VOCAB,
        group=group,
        chunk_tokens=chunk_tokens,
    )
    (torch.stack(values) * given["upstream"]).sum().backward()
    return [value.detach() for value in (*values, hidden.grad, weight.grad)]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], rel: float) -> None:
    for name, value, reference in zip(["logprobs", "entropy", "d hidden", "d weight"], found, expected, strict=True):
        error = (value.double() - reference).abs().max() / reference.abs().max()
        assert error <= rel, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(("temperature", "ban"), CASES)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_one_rank_equals_log_softmax(dtype: torch.dtype, rel: float, temperature: float, ban: bool):
    expected = dense(temperature, ban)
    for chunk_tokens in (1, 5, 100):
        found = chunked(dtype, temperature, ban, chunk_tokens)
        assert {value.dtype for value in found} == {dtype}
        assert_near(found, expected, rel)


def on_rank() -> list[list[torch.Tensor]]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    results = [
        chunked(dtype, *case, chunk_tokens=5, rank=rank, size=2, group=dist.group.WORLD)
        for case in CASES
        for dtype in (torch.float64, torch.float32)
    ]
    dist.destroy_process_group()
    return [[value.numpy() for value in result] for result in results]


def test_two_ranks_equal_log_softmax():
    ranks = [[[torch.from_numpy(value) for value in result] for result in rank] for rank in run_ranks(on_rank, 2)]
    for index, (case, rel) in enumerate((case, rel) for case in CASES for rel in (1e-13, 1e-5)):
        (logp0, entropy0, hidden0, weight0), (logp1, entropy1, hidden1, weight1) = (rank[index] for rank in ranks)
        assert torch.equal(logp0, logp1)
        assert torch.equal(entropy0, entropy1)
        # each rank holds its part of the hidden gradient and its own rows of the weight's
        assert_near([logp0, entropy0, hidden0 + hidden1, torch.cat([weight0, weight1])], dense(*case), rel)


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


def test_only_what_needs_a_gradient_gets_one():
    given = problem(torch.float32)
    hidden, frozen = given["hidden"].clone().requires_grad_(), given["weight"]
    logprobs, entropy = call(hidden=hidden, weight=frozen)
    logprobs.sum().backward()  # the entropy is not used
    assert hidden.grad.abs().sum() > 0
    hidden.grad = None
    weight = given["weight"].clone().requires_grad_()
    _, entropy = call(weight=weight)
    entropy.sum().backward()
    assert weight.grad[:VOCAB].abs().sum() > 0
    assert weight.grad[VOCAB:].abs().sum() == 0  # padding learns nothing


def test_a_micro_batch_without_loss_tokens_gives_a_zero_gradient():
    given = problem(torch.float32)
    hidden, weight = given["hidden"][:0].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    logprobs, _ = call(hidden=hidden, weight=weight, targets=given["targets"][:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bfloat16_inputs_give_float32_values():
    logprobs, entropy = call(
        hidden=problem(torch.bfloat16)["hidden"].requires_grad_(),
        weight=problem(torch.bfloat16)["weight"].requires_grad_(),
    )
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_near([logprobs.detach(), entropy.detach()] * 2, dense(1.0, ban=False)[:2] * 2, 2e-2)
    logprobs.sum().backward()


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        call(temperature=0.0)
    with pytest.raises(ValueError, match="13 rows of hidden states but 12 targets"):
        call(targets=problem(torch.float32)["targets"][:12])
