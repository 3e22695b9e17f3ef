"""Causal attention over torch's SDPA, for batches of rows and for packed sequences, on one or several context ranks.

Stands where mcore would put Transformer Engine. A row's padding is on its right, so the causal mask alone keeps real
tokens from reading it. Under context parallelism (``parallel/context.py``) a rank has queries for its own tokens and
gathers everyone's keys and values; the mask then comes from the tokens' places in their sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.context import held_tokens
from megatron_mmrl.parallel.device import on_cuda


@functools.cache
def on_transformer_engine() -> bool:
    """Whether Transformer Engine's layers, attention included, stand in for ours."""
    return on_cuda() and importlib.util.find_spec("transformer_engine") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Sequences of similar lengths as rows of one attention call; 0 past the end of a sequence."""

    queries: Tensor
    """int64 [sequences, longest / size], among the tokens that this rank holds."""
    keys: Tensor
    """int64 [sequences, longest], among all tokens as they are gathered: rank after rank."""
    mask: Tensor | None
    """bool [sequences, 1, longest / size, longest], true where a query reads a key; None: plainly causal."""


@dataclass
class PackedSequences(PackedSeqParams):
    """Bounds of packed sequences, as Megatron passes them along, and how attention gathers them into rows."""

    num_tokens: int = 0
    """Of the whole pack, T."""
    context_size: int = 1
    held: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [T / context size]: the tokens of the pack that this rank computes."""
    rows: tuple[Rows, ...] = ()
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [T / context size]: where a held token stands among all rows' queries, flattened."""


def pack(cu_seqlens: Tensor, device: torch.device, *, rank: int = 0, size: int = 1) -> PackedSequences:
    """Describe a pack whose sequence s is ``cu_seqlens[s]:cu_seqlens[s + 1]``; every token belongs to one.

    Sequences whose lengths share a power of two become rows of one attention call, so that padding at most doubles
    a row.

    Args:
        cu_seqlens: int32 [S + 1], increasing from 0 to T.
        device: where attention runs.
        rank: context-parallel rank of ``size``.

    Raises:
        ValueError: bounds that do not start at 0, hold an empty sequence or one that the ranks cannot divide.
    """
    bounds = cu_seqlens.to("cpu", torch.int64)
    lengths = bounds.diff()
    require(
        int(bounds[0]) == 0 and bool((lengths > 0).all()),
        f"cu_seqlens must start at 0 and increase, got {bounds.tolist()}",
    )
    held = held_tokens(bounds, rank, size)
    described = bounds.to(torch.int32)
    if on_transformer_engine():
        described, rows, places = described.to(device), [], held  # its kernels read bounds, on the device
    else:
        rows, places = _rows(bounds, held, size)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=described,
        cu_seqlens_kv=described,
        # What Transformer Engine divides by context ranks. Padding in a slot is part of the sequence: being last, it is
        # read by nothing real. On one rank left out, as the kernels would compare the two on every layer.
        cu_seqlens_q_padded=described if size > 1 else None,
        cu_seqlens_kv_padded=described if size > 1 else None,
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(lengths.max()),
        num_tokens=int(bounds[-1]),
        context_size=size,
        held=held.to(device),
        rows=tuple(_to(row, device) for row in rows),
        places=places.to(device),
    )


def _rows(bounds: Tensor, held: Tensor, size: int) -> tuple[list[Rows], Tensor]:
    lengths = bounds.diff()
    buckets: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths.tolist()):
        buckets.setdefault((length - 1).bit_length(), []).append(sequence)
    gathered = held.new_empty(int(bounds[-1]))  # where each token stands once keys are gathered
    gathered[torch.cat([held_tokens(bounds, other, size) for other in range(size)])] = torch.arange(len(gathered))
    rows, places, offset = [], torch.empty_like(held), 0
    for _, members in sorted(buckets.items()):
        starts, sizes = bounds[members], lengths[members]
        queries, is_query = _grid(starts // size, sizes // size)
        keys, is_key = _grid(starts, sizes)
        mask = None
        if size > 1:
            steps = torch.where(is_query, held[queries] - starts[:, None], 0)  # queries past the end read key 0
            mask = (torch.arange(keys.shape[1]) <= steps[:, None, :, None]) & is_key[:, None, None, :]
        rows.append(Rows(queries=queries, keys=gathered[keys], mask=mask))
        places[queries[is_query]] = offset + torch.arange(queries.numel()).view(queries.shape)[is_query]
        offset += queries.numel()
    return rows, places


def _grid(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [sequences, longest]: starts + 0, 1, 2, ..., and 0 past the sizes; and bool, where it is not past them."""
    steps = torch.arange(int(sizes.max()))
    inside = steps < sizes[:, None]
    return torch.where(inside, starts[:, None] + steps, 0), inside


def _to(rows: Rows, device: torch.device) -> Rows:
    mask = None if rows.mask is None else rows.mask.to(device)
    return Rows(queries=rows.queries.to(device), keys=rows.keys.to(device), mask=mask)


class CausalAttention(nn.Module):
    """mcore's ``core_attention``: softmax(q k^T / sqrt(d)) v with a causal mask and grouped key/value heads."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        require(attn_mask_type is AttnMaskType.causal, f"attn_mask_type={attn_mask_type}: only causal is supported")
        require(config.attention_dropout == 0.0, f"attention_dropout={config.attention_dropout}: only 0 is supported")
        self._scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self._context = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """Attend. S and T count the tokens that this context-parallel rank holds.

        Args:
            query: [S, B, heads, d], or packed [T, heads, d]; key and value likewise with their number of heads.
            attention_mask: unused, as are the next two (mcore's signature): the mask is causal.
            attn_mask_type: see above.
            attention_bias: see above.
            packed_seq_params: made by ``pack``; None for rows.

        Returns:
            [S, B, heads * d], or packed [T, heads, d]
        """
        size = self._context.size()
        if size > 1:
            # One collective for both; in backward a rank receives the sum of all ranks' gradients of its own tokens.
            both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self._context)
            key, value = both.chunk(2, dim=-1)
        if packed_seq_params is None:
            mask = _row_mask(query.shape[0] * size, self._context.rank(), size, query.device) if size > 1 else None
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), mask)  # [B, heads, S, d]
            return out.permute(2, 0, 1, 3).flatten(2)
        outs = [
            self._attend(
                _take(query, rows.queries), _take(key, rows.keys), _take(value, rows.keys), rows.mask
            ).transpose(1, 2).flatten(0, 1)
            for rows in packed_seq_params.rows
        ]  # fmt: skip
        return torch.cat(outs).index_select(0, packed_seq_params.places)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=grouped
        )


@functools.lru_cache(maxsize=4)
def _row_mask(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """bool [length / size, length]: which gathered key each held query of a row reads."""
    held = [held_tokens(torch.tensor([0, length]), other, size) for other in range(size)]
    return (torch.cat(held) <= held[rank][:, None]).to(device)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of tokens: [T, heads, d], [rows, longest] -> [rows, heads, longest, d]."""
    return x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:]).transpose(1, 2)
