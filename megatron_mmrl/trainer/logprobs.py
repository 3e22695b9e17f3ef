"""Token log-probs and entropies straight from hidden states, a few rows of logits at a time.

The distribution is softmax(mask(logits) / temperature), the one that the engine samples from. The vocabulary is split
over the tensor-parallel ranks; per chunk of rows two small all-reduces (a maximum, then three sums) join the shards.
Backward recomputes each chunk, so neither pass ever holds more than ``chunk_tokens`` rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

_EXCLUDED = -1e30  # logit of a token that cannot be drawn: exp gives exactly 0 and 0 x it stays 0, unlike -inf


def token_logprobs(  # noqa: PLR0913  # nine independent facts, none of which a dataclass would name better
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    temperature: float,
    banned: Tensor | None,
    vocab_size: int,
    group: ProcessGroup | None,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of each row, both differentiable.

    Args:
        hidden: [N, H], only the rows that are needed, equal on all ranks of ``group``.
        weight: [V / tensor size, H], this rank's rows of the output layer.
        targets: i64[N], the token that each row predicts.
        vocab_start: token id of ``weight[0]``.
        temperature: above 0.
        banned: i64[...], token ids that cannot be drawn; a banned target has log-prob -inf.
        vocab_size: token ids from here on are padding of the weight and cannot be drawn.
        group: the tensor-parallel ranks; None: the weight is whole.
        chunk_tokens: rows of logits that exist at a time.

    Returns:
        Log-probs and entropies in nats, [N], float32 (float64 for float64 inputs), equal on all ranks of ``group``.
        In backward every rank gets the gradient of its own weight rows, and of ``hidden`` only the part that comes
        from them: whatever gave all ranks the same ``hidden`` must sum over the group (Megatron's
        ``copy_to_tensor_model_parallel_region``, or ``gather_from_sequence_parallel_region`` with
        ``tensor_parallel_output_grad=True``). The loss on top must be the same on all ranks and not be divided.

    Raises:
        ValueError: temperature not above 0, or rows and targets that differ in number.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: log-probs to train on need one above 0")
    if len(hidden) != len(targets):
        raise ValueError(f"{len(hidden)} rows of hidden states but {len(targets)} targets")
    head = _Head(
        offsets=_offsets(weight, vocab_start, banned, vocab_size),
        vocab_start=vocab_start,
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
    )
    return _TokenLogprobs.apply(hidden, weight, targets, head)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What turns hidden states into this rank's shard of the distribution, but for the weight."""

    offsets: Tensor  # [V / tensor size], added to the logits: 0 or _EXCLUDED
    vocab_start: int
    temperature: float
    group: ProcessGroup | None
    chunk_tokens: int

    def chunks(self, num_rows: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk_tokens) for start in range(0, num_rows, self.chunk_tokens))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Shard of the masked logits / temperature, [C, V / tensor size], in the dtype of the offsets."""
        logits = (hidden @ weight.t()).to(self.offsets.dtype)
        return torch.add(self.offsets, logits, alpha=1 / self.temperature, out=logits)

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this shard (0 where it is not here), and whether it is here."""
        local = targets - self.vocab_start
        here = (local >= 0) & (local < len(self.offsets))
        return local.where(here, 0), here

    def reduce(self, values: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            all_reduce(values, op=op, group=self.group)
        return values


class _TokenLogprobs(torch.autograd.Function):
    """With z the scaled, masked logits: d log p_y / d z_v = [v = y] - p_v and d H / d z_v = -p_v (log p_v + H)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=head.offsets.dtype, device=hidden.device)
        entropy, log_total = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in head.chunks(len(hidden)):
            logits = head.logits(hidden[rows], weight)
            peak = head.reduce(logits.amax(dim=1), ReduceOp.MAX)
            logits.sub_(peak[:, None])
            column, here = head.columns(targets[rows])
            target = logits.gather(1, column[:, None]).squeeze(1).where(here, 0.0)
            weights = logits.exp()
            total = weights.sum(dim=1)
            sums = head.reduce(torch.stack([total, weights.mul_(logits).sum(dim=1), target]), ReduceOp.SUM)
            log_sum = sums[0].log()
            logprobs[rows] = sums[2] - log_sum
            entropy[rows] = log_sum - sums[1] / sums[0]
            log_total[rows] = log_sum + peak
        logprobs.masked_fill_(logprobs < _EXCLUDED / 2, -torch.inf)
        ctx.save_for_backward(hidden, weight, targets, log_total, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_total, entropy = ctx.saved_tensors
        head: _Head = ctx.head
        grad_logprobs = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs / head.temperature
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=head.offsets.dtype) if ctx.needs_input_grad[1] else None
        for rows in head.chunks(len(hidden)):
            log_probs = head.logits(hidden[rows], weight).sub_(log_total[rows, None])
            grad = log_probs.exp().mul_(grad_logprobs[rows, None])
            if grad_entropy is not None:
                slope = grad_entropy[rows, None] / head.temperature
                grad += log_probs.exp() * (log_probs + entropy[rows, None]) * slope
            grad.neg_()
            column, here = head.columns(targets[rows])
            grad.scatter_add_(1, column[:, None], grad_logprobs[rows].where(here, 0.0)[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; in place where the dtypes allow it, since ``total`` is as large as the output layer."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _offsets(weight: Tensor, vocab_start: int, banned: Tensor | None, vocab_size: int) -> Tensor:
    """0 for tokens of this shard that can be drawn, else _EXCLUDED, in the dtype the logits are used in."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    offsets = torch.zeros(len(weight), dtype=dtype, device=weight.device)
    offsets[max(0, vocab_size - vocab_start) :] = _EXCLUDED
    if banned is not None:
        local = banned.to(weight.device).flatten() - vocab_start
        offsets[local[(local >= 0) & (local < len(weight))]] = _EXCLUDED
    return offsets
