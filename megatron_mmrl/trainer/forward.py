"""Micro-batches through Megatron's pipeline schedule, and token log-probs at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from megatron_mmrl import pulse
from megatron_mmrl.parallel.attention import pack
from megatron_mmrl.parallel.context import assemble, held_tokens
from megatron_mmrl.parallel.device import device
from megatron_mmrl.trainer.logprobs import token_logprobs
from megatron_mmrl.trainer.repetition import repetition_of
from megatron_mmrl.types import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDistribution:
    """What the engine samples from: softmax(mask(penalise(logits)) / temperature)."""

    temperature: float
    banned: torch.Tensor  # i64[...], token ids that cannot be drawn
    vocab_size: int  # rows of the output layer beyond it are padding
    chunk_tokens: int  # rows of logits that exist at a time
    repetition_penalty: float = 1.0  # of tokens that the response already holds


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """Log-probs and entropies of a micro-batch's N loss tokens, all of them on every context-parallel rank."""

    rows: Tensor  # i64[N], positions in the micro-batch
    logprobs: Tensor  # f32[N]
    entropy: Tensor  # f32[N], nats

    def scatter(self, num_tokens: int) -> Tensor:
        """Log-probs as f32[T], 0 outside the loss mask."""
        full = torch.zeros(num_tokens, dtype=torch.float32, device=self.logprobs.device)
        return full.index_copy(0, self.rows, self.logprobs.detach())


OnTokens = Callable[[MicroBatch, TokenValues], tuple["Tensor", Any]]


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[MicroBatch],
    distribution: TokenDistribution,
    on_tokens: OnTokens,
    *,
    forward_only: bool,
) -> list[Any]:
    """Forward (and backward) all micro-batches.

    ``on_tokens`` runs on the last pipeline stage for each micro-batch and returns (scalar loss, record); the records
    are returned there in order, an empty list on the other stages. All micro-batches must have one shape. Under context
    parallelism every rank of the group is given the same micro-batches, calls ``on_tokens`` with the same values and
    must return the same loss: each contributes the gradient of the tokens that it computed.
    """
    first = batches[0]
    rows = first.num_rows or 1

    def step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        pulse.beat()
        batch = next(iterator)
        reads_images = get_attr_wrapped_model(chunk, "pre_process")
        return chunk(**model_inputs(batch, reads_images=reads_images)), partial(finish, batch, chunk)

    def finish(batch: MicroBatch, chunk: torch.nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        values = _token_values(batch, chunk, hidden, distribution)
        loss, record = on_tokens(batch, values)
        return loss, torch.zeros((), dtype=torch.int), record

    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=len(first.input_ids) // rows,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def model_inputs(batch: MicroBatch, *, reads_images: bool = True) -> dict[str, Any]:
    """Arrays as the model takes them: [1, T] packed with cu_seqlens, or [B, S] padded; the whole micro-batch."""
    rows, where = batch.num_rows or 1, device()
    packed = None
    if batch.num_rows is None:
        packed = pack(torch.from_numpy(batch.cu_seqlens), where, **_context_place())
    has_images = reads_images and len(batch.image_grid_thw) > 0
    return {
        "input_ids": torch.from_numpy(batch.input_ids).to(where).view(rows, -1),
        "position_ids": torch.from_numpy(batch.position_ids).to(where).view(3, rows, -1),
        "packed_seq_params": packed,
        # On the host: a rank moves only those that it encodes.
        "pixel_values": torch.from_numpy(batch.pixel_values) if has_images else None,
        "image_grid_thw": torch.from_numpy(batch.image_grid_thw) if has_images else None,
    }


def _token_values(
    batch: MicroBatch, chunk: torch.nn.Module, hidden: Tensor, distribution: TokenDistribution
) -> TokenValues:
    """Log-probs where the loss mask is true: the row of token t - 1 predicts ``input_ids[t]``.

    ``hidden``: [B, S / cp, H], rows of the tokens that this context-parallel rank holds; it computes those of its own.
    """
    loss_tokens = torch.from_numpy(batch.loss_mask).nonzero().squeeze(1)
    held = held_tokens(torch.from_numpy(batch.cu_seqlens), **_context_place())
    row_of = torch.full((len(batch.input_ids),), -1).index_copy(0, held, torch.arange(len(held)))
    rows = row_of[loss_tokens - 1]
    own = (rows >= 0).nonzero().squeeze(1)
    weight = get_attr_wrapped_model(chunk, "output_weight")()
    values = token_logprobs(
        hidden.reshape(-1, hidden.shape[-1])[rows[own].to(hidden.device)],
        weight,
        torch.from_numpy(batch.input_ids)[loss_tokens[own]].to(hidden.device),
        vocab_start=parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
        temperature=distribution.temperature,
        banned=distribution.banned,
        vocab_size=distribution.vocab_size,
        group=parallel_state.get_tensor_model_parallel_group(),
        chunk_tokens=distribution.chunk_tokens,
        repetition=repetition_of(
            batch.input_ids,
            batch.loss_mask,
            batch.cu_seqlens,
            own.numpy(),
            penalty=distribution.repetition_penalty,
            device=hidden.device,
        ),
    )
    logprobs, entropy = assemble(
        torch.stack(values), own.to(hidden.device), len(rows), parallel_state.get_context_parallel_group()
    )
    return TokenValues(rows=loss_tokens.to(hidden.device), logprobs=logprobs, entropy=entropy)


def _context_place() -> dict[str, int]:
    return {
        "rank": parallel_state.get_context_parallel_rank(),
        "size": parallel_state.get_context_parallel_world_size(),
    }
