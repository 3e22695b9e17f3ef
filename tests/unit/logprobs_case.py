"""A small output layer of several vocabulary tiles, and its log-probs from whole logits, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mmrl.trainer.logprobs import token_logprobs

ROWS, HIDDEN = 13, 16
VOCAB, PADDED = 4500, 6000  # three tiles; of 4 tensor-parallel ranks the last holds nothing but padding
BANNED = torch.cat([torch.tensor([0, 5, 23, 4499]), torch.arange(2040, 2100)])  # on both sides of a tile's edge
CASES = [(1.0, False), (0.7, True), (2.5, True)]  # temperature, whether the ban holds
NAMES = ("logprobs", "entropy", "d hidden", "d weight")


def problem(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits grow with the token id, so that every tile brings a new maximum."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor(sorted(set(range(VOCAB)) - set(BANNED.tolist())))
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    return {
        "hidden": torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype),
        "weight": (weight * torch.linspace(0.1, 1.5, PADDED, dtype=torch.float64)[:, None]).to(dtype),
        "targets": allowed[torch.randint(len(allowed), (ROWS,), generator=generator)],
        "upstream": torch.randn(2, ROWS, generator=generator, dtype=torch.float64).to(dtype),
    }


def dense(temperature: float, ban: bool) -> list[Tensor]:
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
) -> list[Tensor]:
    """The same from ``token_logprobs`` on tensor-parallel rank ``rank`` of ``size``."""
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


def assert_near(found: list[Tensor], expected: list[Tensor], rel: float) -> None:
    """Largest difference against the largest value, of each of the four."""
    for name, value, reference in zip(NAMES, found, expected, strict=True):
        assert value.shape == reference.shape, name
        error = (value.double() - reference).abs().max() / reference.abs().max()
        assert error <= rel, f"{name}: relative error {error:.2e}"
