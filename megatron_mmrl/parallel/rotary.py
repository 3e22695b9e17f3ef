"""Rotary embedding from explicit multimodal positions, one row per token that this rank holds.

Replaces mcore's: it finds the angles of a packed batch by position in each sequence unless there are as many of them as
tokens in the pack (silently), and under context parallelism it cuts the pack as if it were one sequence. Here row t of
the angles turns token t, and nothing else is known about sequences or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_mmrl.parallel.device import device


class MultimodalRotary(nn.Module):
    """mrope (Qwen2-VL, section 2.1): parts of the head dimension turn by time, height and width.

    Args:
        head_dim: size of an attention head.
        base: theta of rotary embedding.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        self._inverse_frequencies = (1.0 / base**exponents).to(device())  # no buffer: never cast to bfloat16

    def forward(self, position_ids: Tensor, mrope_section: Sequence[int], cp_group: object = None) -> Tensor:
        """Cosines and sines.

        Args:
            position_ids: int64 [3, B, S], rows t, h, w.
            mrope_section: how many of the head_dim / 2 frequencies turn by t, h and w.
            cp_group: passed by mcore, unused.

        Returns:
            float32 [2, S, B, 1, head_dim], as ``RotarySelfAttention`` takes it.
        """
        angles = position_ids[..., None].to(torch.float32) * self._inverse_frequencies  # [3, B, S, head_dim / 2]
        by_axis = [part[axis] for axis, part in enumerate(angles.split(list(mrope_section), dim=-1))]
        half = torch.cat(by_axis, dim=-1)
        full = torch.cat((half, half), dim=-1).transpose(0, 1).unsqueeze(2)
        return torch.stack((full.cos(), full.sin()))


class RotarySelfAttention(SelfAttention):
    """mcore's self-attention, whose queries and keys are turned by what ``MultimodalRotary`` returned."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As in mcore, which is not given the angles: it must not turn anything again."""
        self._turns = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [S, B, heads, head_dim] of this rank's heads, turned where they should be."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return rotate(query, self._turns), rotate(key, self._turns), value


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of [S, B, heads, d] by [2, S, B, 1, d], cosines and sines."""
    cos, sin = turns.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
