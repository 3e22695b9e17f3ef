"""Token log-probs and entropies straight from hidden states: the logits exist only one small tile at a time.

The distribution is softmax(mask(penalise(logits)) / temperature), the one that the engine samples from. The vocabulary
is cut into tiles, and running sums over them (online softmax: Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax") are moved to a new maximum when one is found; the tensor-parallel ranks join theirs in the
same way, with two all-reduces for all rows together. Backward makes each tile again, as FlashAttention does, so that
neither pass holds more than ``chunk_tokens`` rows of one tile, and each row of the weight's gradient is finished before
the next begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_mmrl.trainer.repetition import Patch, Repetition

_EXCLUDED = -1e30  # logit of a token that cannot be drawn: exp gives exactly 0 and 0 x it stays 0, unlike -inf
_TILE_COLUMNS_CPU = 2048  # a tile stays in the caches; smaller ones are no faster
_TILE_COLUMNS_GPU = 16384  # a kernel's launch must be short beside its work


def token_logprobs(  # noqa: PLR0913  # ten independent facts, none of which a dataclass would name better
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
    repetition: Repetition | None = None,
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
        repetition: penalty on tokens that a row's response already holds; None: none.

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
        tiles=_tiles(weight, vocab_start, banned, vocab_size),
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
        repetition=repetition,
        vocab_start=vocab_start,
        dtype=torch.promote_types(weight.dtype, torch.float32),
    )
    return _TokenLogprobs.apply(hidden, weight, targets - vocab_start, head)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Neighbouring columns of this rank's logits."""

    columns: slice
    excluded: Tensor  # i64[...], those of its columns, counted within the tile, that cannot be drawn

    @property
    def width(self) -> int:
        return self.columns.stop - self.columns.start

    def find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target within the tile (0 where it is not here), and whether it is here."""
        local = targets - self.columns.start
        here = (local >= 0) & (local < self.width)
        return local.where(here, 0)[:, None], here


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What turns hidden states into this rank's shard of the distribution, but for the weight."""

    tiles: tuple[_Tile, ...]
    temperature: float
    group: ProcessGroup | None
    chunk_tokens: int
    repetition: Repetition | None
    vocab_start: int
    dtype: torch.dtype  # of logits, sums and results

    def rows(self, hidden: Tensor) -> Iterator[slice]:
        size = len(hidden)
        return (slice(start, min(start + self.chunk_tokens, size)) for start in range(0, size, self.chunk_tokens))

    def scratch(self, hidden: Tensor) -> Tensor:
        """Room for two tiles of logits, used again and again: fresh memory would cost page faults for each."""
        size = min(self.chunk_tokens, len(hidden)) * max(tile.width for tile in self.tiles)
        return torch.empty(2, size, dtype=self.dtype, device=hidden.device)

    def logits(
        self, hidden: Tensor, rows: slice, shard: Tensor, tile: _Tile, scratch: Tensor
    ) -> tuple[Tensor, Tensor, list[Patch]]:
        """Penalised, masked logits / temperature, [C, tile], of ``rows`` and the weight rows ``shard``.

        And as much memory to work in, and what the penalty multiplied.
        """
        hidden = hidden[rows]
        logits, spare = (half[: len(hidden) * tile.width].view(-1, tile.width) for half in scratch)
        if hidden.dtype == self.dtype:
            torch.addmm(logits, hidden, shard.t(), beta=0, alpha=1 / self.temperature, out=logits)
        else:
            logits.copy_(hidden @ shard.t()).mul_(1 / self.temperature)
        patches = self._penalise(logits, rows, tile) if self.repetition is not None else []
        if len(tile.excluded):
            logits.index_fill_(1, tile.excluded, _EXCLUDED)
        return logits, spare, patches

    def _penalise(self, logits: Tensor, rows: slice, tile: _Tile) -> list[Patch]:
        assert self.repetition is not None
        ids = slice(self.vocab_start + tile.columns.start, self.vocab_start + tile.columns.stop)
        patches = list(self.repetition.patches(logits, rows, ids))
        for patch in patches:
            patch.apply(logits)
        return patches

    def reduce(self, values: Tensor, op: ReduceOp.RedOpType) -> Tensor:
        if self.group is not None:
            all_reduce(values, op=op, group=self.group)
        return values


class _Sums:
    """Of each row, over the columns seen so far: the peak, sum exp(z - peak) and sum exp(z - peak) (z - peak)."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        self.peak = like.new_full((num_rows,), _EXCLUDED)
        self.total, self.moment = like.new_zeros(2, num_rows)

    def move(self, rows: slice, peak: Tensor) -> None:
        """Make the sums relative to another peak, at least as high."""
        shift = self.peak[rows] - peak
        scale = shift.exp()
        self.moment[rows] = scale * (self.moment[rows] + shift * self.total[rows])
        self.total[rows] *= scale
        self.peak[rows] = peak

    def add(self, rows: slice, logits: Tensor, spare: Tensor) -> None:
        """Take in more columns; both arguments are overwritten."""
        self.move(rows, torch.maximum(self.peak[rows], logits.amax(dim=1)))
        logits.sub_(self.peak[rows, None])
        torch.exp(logits, out=spare)
        self.total[rows] += spare.sum(dim=1)
        self.moment[rows] += spare.mul_(logits).sum(dim=1)


class _TokenLogprobs(torch.autograd.Function):
    """With z the scaled, masked logits: d log p_y / d z_v = [v = y] - p_v and d H / d z_v = -p_v (log p_v + H)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
        scratch = head.scratch(hidden)
        sums, target = _Sums(len(hidden), scratch), scratch.new_zeros(len(hidden))
        for tile in head.tiles:
            for rows in head.rows(hidden):
                logits, spare, _ = head.logits(hidden, rows, weight[tile.columns], tile, scratch)
                column, here = tile.find(targets[rows])
                target[rows] += logits.gather(1, column).squeeze(1).where(here, 0.0)
                sums.add(rows, logits, spare)
        sums.move(slice(None), head.reduce(sums.peak.clone(), ReduceOp.MAX))
        total, moment, target = head.reduce(torch.stack([sums.total, sums.moment, target]), ReduceOp.SUM)
        log_sum = total.log()
        entropy = log_sum - moment / total
        logprobs = (target - sums.peak - log_sum).masked_fill_(target < _EXCLUDED / 2, -torch.inf)
        ctx.save_for_backward(hidden, weight, targets, log_sum + sums.peak, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_total, entropy = ctx.saved_tensors
        head: _Head = ctx.head
        slopes = _Slopes.of(grad_logprobs, grad_entropy, entropy, head.temperature)
        scratch = head.scratch(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=head.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for tile in head.tiles:
            shard = weight[tile.columns]
            shard_grad = None if grad_weight is None else _accumulator(grad_weight[tile.columns], head.dtype)
            for rows in head.rows(hidden):
                logits, spare, patches = head.logits(hidden, rows, shard, tile, scratch)
                column, here = tile.find(targets[rows])
                grad = slopes.at(rows, logits.sub_(log_total[rows, None]), spare)
                grad.scatter_add_(1, column, slopes.target[rows].where(here, 0.0)[:, None])
                for patch in patches:
                    patch.apply(grad)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], grad, shard)
                if shard_grad is not None:
                    _add_product(shard_grad, grad.t(), hidden[rows])
            if grad_weight is not None and shard_grad is not None and shard_grad.dtype != weight.dtype:
                grad_weight[tile.columns] = shard_grad
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slopes:
    """Of each row, what makes d loss / d z_v = [v = y] target - p_v (shift + slope log p_v)."""

    target: Tensor  # [N], as all three
    shift: Tensor
    slope: Tensor | None  # None: the loss does not use the entropy

    @classmethod
    def of(cls, logprobs: Tensor | None, entropies: Tensor | None, entropy: Tensor, temperature: float) -> _Slopes:
        """From d loss / d log-prob and d loss / d entropy, [N]; None where the loss does not use them."""
        target = torch.zeros_like(entropy) if logprobs is None else logprobs / temperature
        if entropies is None:
            return cls(target=target, shift=target, slope=None)
        slope = entropies / temperature
        return cls(target=target, shift=target + slope * entropy, slope=slope)

    def at(self, rows: slice, log_probs: Tensor, spare: Tensor) -> Tensor:
        """The part of the gradient that all columns have, [C, tile], in ``spare``; ``log_probs`` is overwritten."""
        probs = torch.exp(log_probs, out=spare)
        if self.slope is None:
            return probs.mul_(-self.shift[rows, None])
        return probs.mul_(log_probs.mul_(-self.slope[rows, None]).sub_(self.shift[rows, None]))


def _accumulator(zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Where products are summed in ``dtype``: in place if that is the dtype of ``zeros``."""
    return zeros if zeros.dtype == dtype else zeros.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _tiles(weight: Tensor, vocab_start: int, banned: Tensor | None, vocab_size: int) -> tuple[_Tile, ...]:
    """Tiles over the columns of this shard; those of padding and of banned tokens are excluded."""
    width = _TILE_COLUMNS_CPU if weight.device.type == "cpu" else _TILE_COLUMNS_GPU
    num_real = min(max(0, vocab_size - vocab_start), len(weight))
    excluded = torch.arange(num_real, len(weight))
    if banned is not None:
        excluded = torch.cat([excluded, banned.flatten().cpu() - vocab_start])
    tiles = []
    for start in range(0, len(weight), width):
        columns = slice(start, min(start + width, len(weight)))
        inside = excluded[(excluded >= columns.start) & (excluded < columns.stop)] - start
        tiles.append(_Tile(columns=columns, excluded=inside.to(weight.device)))
    return tuple(tiles)
