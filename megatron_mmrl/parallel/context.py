"""Context parallelism: which tokens of a sequence a rank holds, and how the ranks' values come back together.

Every sequence is cut into 2 x size equal chunks, of which rank r holds chunks r and 2 x size - 1 - r: an early one and
a late one, so that under a causal mask all ranks have the same work. Transformer Engine cuts in the same way.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmrl.config.checks import require


def held_tokens(bounds: Tensor, rank: int, size: int) -> Tensor:
    """Tokens that a context-parallel rank holds, in the order in which it holds them.

    Args:
        bounds: [S + 1] on the CPU; sequence s is ``bounds[s]:bounds[s + 1]``.
        rank: context-parallel rank of ``size``.

    Returns:
        int64 [T / size], sequence after sequence.

    Raises:
        ValueError: a sequence is not a multiple of 2 x size long.
    """
    if size == 1:
        return torch.arange(int(bounds[-1]))
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        chunk, rest = divmod(end - start, 2 * size)
        require(
            rest == 0,
            f"the sequence at tokens {start}:{end} is {end - start} long, which context_parallel_size={size} cannot "
            f"divide; pad every sequence to a multiple of {2 * size}",
        )
        firsts = (start + number * chunk for number in (rank, 2 * size - 1 - rank))
        parts += [torch.arange(first, first + chunk) for first in firsts]
    return torch.cat(parts)


def assemble(values: Tensor, places: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' values in one tensor, equal on every rank; what is computed from it must be equal as well.

    Args:
        values: [..., n], this rank's values.
        places: int64 [n], where they stand; no place is taken by two ranks.
        length: places there are; what no rank fills is 0.

    Returns:
        [..., length]. In backward each rank keeps the gradient of its own values.
    """
    return values if group.size() == 1 else _Assemble.apply(values, places, length, group)


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(places)
        full = values.new_zeros(*values.shape[:-1], length).index_copy(-1, places, values)
        dist.all_reduce(full, group=group)  # one rank's value plus zeros: exact
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad.index_select(-1, places), None, None, None
