"""SGLang's CPU attention backend with its Python loop over sequences taken out of the common cases.

Imported inside SGLang's processes only. Written against SGLang 0.5.20.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from megatron_mmrl.rollout.batched_attention import attend_last_tokens


class BatchedDecodeAttention(TorchNativeAttnBackend):
    """Decoding in one call for all sequences. Every result has the bits that one sequence alone would give."""

    def _run_sdpa_forward_decode(self, *inputs: torch.Tensor | None, **options: object) -> torch.Tensor:
        if not _is_plain_attention(inputs, options):
            return super()._run_sdpa_forward_decode(*inputs, **options)
        return _attend_last(inputs[:7], options["scaling"])


class BatchedAttention(BatchedDecodeAttention):
    """Also the last token of prompts whose other tokens are cached: the copies of a prompt.

    It rounds unlike SGLang's attention of whole prompts, so which of the two a prompt meets would show in the bits.
    """

    def _run_sdpa_forward_extend(self, *inputs: torch.Tensor | None, **options: object) -> torch.Tensor:
        new_tokens = inputs[8]
        if not _is_plain_attention(inputs, options) or bool((new_tokens != 1).any()):
            return super()._run_sdpa_forward_extend(*inputs, **options)
        return _attend_last(inputs[:7], options["scaling"])


def _is_plain_attention(inputs: tuple[torch.Tensor | None, ...], options: dict[str, object]) -> bool:
    """Self-attention over the whole sequence, cache and activations in one type. The last input is encoder lengths."""
    return (
        inputs[-1] is None
        and not options["is_cross_attn"]
        and options["sliding_window_size"] is None
        and inputs[0].dtype == inputs[2].dtype
    )


def _attend_last(inputs: tuple[torch.Tensor, ...], scale: float | None) -> torch.Tensor:
    query, output, keys, values, slots_of_requests, requests, lengths = inputs
    slots = slots_of_requests[requests, : int(lengths.max())]
    return output.copy_(attend_last_tokens(query, (keys, values), slots, lengths, scale))
