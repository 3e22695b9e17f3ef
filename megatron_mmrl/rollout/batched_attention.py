"""Attention of one new token per sequence over a paged KV cache, many sequences at once, in plain PyTorch.

SGLang's CPU attention loops over sequences in Python, which is most of the time of decoding with a small model.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_LENGTH_STEP = 16
_MAX_SLOTS = 1 << 16  # KV slots gathered at a time, so that long sequences do not copy the whole cache


def attend_last_tokens(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of each sequence's last token to the whole sequence.

    Sequences of about the same length go together, padded to a length that depends on their own alone: how much
    padding there is shows in the last bits. So a row has the same bits in any batch, where matrix products have
    that property, and little is computed in vain.

    Args:
        query: [B, Hq, D].
        caches: keys and values, each [S, Hkv, D], contiguous; Hkv divides Hq.
        slots: integer [B, at least max(lengths)], where each token's key and value are; what is past the length is
            not used.
        lengths: integer [B], the last token included.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        [B, Hq, D].
    """
    padded = (lengths + _LENGTH_STEP - 1) // _LENGTH_STEP * _LENGTH_STEP
    output = torch.empty_like(query)
    for longest in padded.unique().tolist():
        together = (padded == longest).nonzero()[:, 0]
        for rows in together.split(max(1, _MAX_SLOTS // longest)):
            output[rows] = _attend(query[rows], caches, slots[rows, :longest], lengths[rows], longest, scale)
    return output


def _attend(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    scale: float | None,
) -> torch.Tensor:
    batch, heads, size = query.shape
    kv_heads = caches[0].shape[1]
    present = torch.arange(longest, device=query.device) < lengths[:, None]
    slots = pad(slots, (0, longest - slots.shape[1])).masked_fill(~present, 0).reshape(-1)
    keys, values = (
        cache.view(len(cache), -1).index_select(0, slots).view(batch, longest, kv_heads, size).transpose(1, 2)
        for cache in caches
    )
    # The query heads that share a key head stand where a longer query would have its tokens.
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, size)
    mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=present[:, None, None, :], scale=scale)
    return mixed.reshape(batch, heads, size)
