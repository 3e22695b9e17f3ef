"""Causal attention over torch's SDPA, for batches of rows and for packed sequences.

Stands where mcore would put Transformer Engine. A row's padding is on its right, so the causal mask alone keeps real
tokens from reading it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_mmrl.config.checks import require


@dataclass
class PackedSequences(PackedSeqParams):
    """Bounds of packed sequences, as Megatron passes them along, and how attention gathers them into rows.

    ``cu_seqlens`` stay on the CPU: Megatron and we read them as numbers, which would stall a CUDA device.
    """

    rows: tuple[Tensor, ...] = ()
    """Per bucket of similar lengths: int64 [sequences, longest], the token at each place (0 past the end)."""
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 [T]: where token t stands among all rows' places, flattened."""


def pack(cu_seqlens: Tensor, device: torch.device) -> PackedSequences:
    """Describe a pack whose sequence s is ``cu_seqlens[s]:cu_seqlens[s + 1]``; every token belongs to one.

    Sequences whose lengths share a power of two become rows of one attention call, so that padding at most doubles
    a row.

    Args:
        cu_seqlens: int32 [S + 1], increasing from 0 to T.
        device: where attention runs.

    Raises:
        ValueError: bounds that do not start at 0 or hold an empty sequence.
    """
    bounds = cu_seqlens.to("cpu", torch.int64)
    lengths = bounds.diff()
    require(
        int(bounds[0]) == 0 and bool((lengths > 0).all()),
        f"cu_seqlens must start at 0 and increase, got {bounds.tolist()}",
    )
    buckets: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths.tolist()):
        buckets.setdefault((length - 1).bit_length(), []).append(sequence)
    rows, places, offset = [], torch.empty(int(bounds[-1]), dtype=torch.int64), 0
    for _, members in sorted(buckets.items()):
        starts, sizes = bounds[members], lengths[members]
        steps = torch.arange(int(sizes.max()))
        inside = steps < sizes[:, None]
        tokens = torch.where(inside, starts[:, None] + steps, 0)
        places[tokens[inside]] = offset + torch.arange(inside.numel()).view(inside.shape)[inside]
        offset += inside.numel()
        rows.append(tokens.to(device))
    cpu_bounds, longest = bounds.to(torch.int32), int(lengths.max())
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cpu_bounds,
        cu_seqlens_kv=cpu_bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        rows=tuple(rows),
        places=places.to(device),
    )


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
        require(
            config.context_parallel_size == 1,
            f"context_parallel_size={config.context_parallel_size}: attention over context-parallel ranks is not "
            "supported yet; use 1",
        )
        require(attn_mask_type is AttnMaskType.causal, f"attn_mask_type={attn_mask_type}: only causal is supported")
        require(config.attention_dropout == 0.0, f"attention_dropout={config.attention_dropout}: only 0 is supported")
        self._scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

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
        """Attend.

        Args:
            query: [S, B, heads, d], or packed [T, heads, d]; key and value likewise with their number of heads.
            attention_mask: unused, as are the next two (mcore's signature): the mask is causal.
            attn_mask_type: see above.
            attention_bias: see above.
            packed_seq_params: made by ``pack``; None for rows.

        Returns:
            [S, B, heads * d], or packed [T, heads, d]
        """
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))  # [B, heads, S, d]
            return out.permute(2, 0, 1, 3).flatten(2)
        outs = [
            self._attend(*(_take(x, tokens).transpose(1, 2) for x in (query, key, value))).transpose(1, 2).flatten(0, 1)
            for tokens in packed_seq_params.rows
        ]
        return torch.cat(outs).index_select(0, packed_seq_params.places)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=self._scale, enable_gqa=grouped)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """Rows of tokens: [T, heads, d], [rows, longest] -> [rows, longest, heads, d]."""
    return x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:])
