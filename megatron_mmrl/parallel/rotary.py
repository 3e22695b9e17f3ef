"""Rotary angles from explicit multimodal positions, one row per token of the batch.

Replaces mcore's module of the same purpose because packed batches need rows of exact positions: mcore applies row t of
the angles to token t only if there are as many rows as tokens, and otherwise restarts at row 0 for every sequence,
silently. ``PackedSequences`` (parallel/attention.py) therefore has to cover every token, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        """Angles in radians.

        Args:
            position_ids: int64 [3, B, S], rows t, h, w.
            mrope_section: how many of the head_dim / 2 frequencies turn by t, h and w.
            cp_group: passed by mcore, unused.

        Returns:
            float32 [S, B, 1, head_dim]
        """
        angles = position_ids[..., None].to(torch.float32) * self._inverse_frequencies  # [3, B, S, head_dim / 2]
        by_axis = [part[axis] for axis, part in enumerate(angles.split(list(mrope_section), dim=-1))]
        half = torch.cat(by_axis, dim=-1)
        return torch.cat((half, half), dim=-1).transpose(0, 1).unsqueeze(2).contiguous()
