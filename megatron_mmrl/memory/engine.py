"""Bytes that an SGLang engine takes of each of its GPUs besides weights: KV cache, graphs, work space, context.

The KV cache holds ``rollout.max_total_tokens`` tokens, or what ``rollout.mem_fraction_static`` leaves: SGLang takes
that share of the free memory it finds at its start, for its weights and the cache together
(``mem_cache/kv_cache_configurator.py``: ``_profile_available_bytes``). It starts with dummy weights of its own, before
the trainer has any, so the whole device counts as free; the dummies are dropped when the trainer's are attached.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.memory.model import ITEM_BYTES, DType, ModelSizes

MIB = 1 << 20
CONTEXT_BYTES = 1536 * MIB
"""Assumed, not measured: a process's CUDA context (about 0.5 GiB), its NCCL buffers and cuBLAS work space."""
_GRAPH_BYTES = 2 * MIB  # of a captured batch size: SGLang's rule, arg_groups/memory_hook.py reserve_for_graph_mb
_PREFILL_GRAPH_BYTES, _PREFILL_GRAPHS = 8 * MIB, 58  # likewise; sizes up to its 8192 tokens
_GRAPH_SEQUENCES = (256, 512)  # largest batch captured on 80 and 141 GB GPUs, below and from tensor size 4 on
_PREFILL_TOKENS = 8192  # SGLang's chunk of a prompt on these GPUs
_PAGE_TOKENS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBytes:
    """Of one GPU of an engine, weights left out."""

    kv_tokens: int
    """That the KV cache holds; 0 or less: there is no room for one."""
    token: int
    """Bytes of one token in it."""
    kv_cache: int
    """Given back while the trainer works."""
    overhead: int
    """Not given back: context, CUDA graphs, table of requests, work space."""


def kv_token_bytes(model: ModelSizes, dtype: DType, tensor: int) -> int:
    """Of one token on one engine rank: keys and values of each layer, 2 x layers x heads x d x item.

    With fewer key/value heads than ranks, each rank holds one whole head.
    """
    text = model.text
    return 2 * text.layers * max(1, text.groups // tensor) * text.head_dim * ITEM_BYTES[dtype]


def engine_bytes(
    model: ModelSizes, rollout: RolloutConfig, dtype: DType, *, weights: int, device_bytes: int
) -> EngineBytes:
    """Of one engine rank.

    Args:
        weights: bytes of an engine rank's weights, all of them.
        device_bytes: of the GPU.
    """
    a_token = kv_token_bytes(model, dtype, rollout.tensor_parallel_size)
    tokens = rollout.max_total_tokens
    if tokens is None:
        tokens = (int(rollout.mem_fraction_static * (device_bytes - CONTEXT_BYTES)) - weights) // a_token
    return EngineBytes(
        kv_tokens=tokens,
        token=a_token,
        kv_cache=max(0, tokens + _PAGE_TOKENS) * a_token,
        overhead=CONTEXT_BYTES + _graphs(rollout) + _requests(model, rollout) + _work(model, rollout, dtype),
    )


def _graphs(rollout: RolloutConfig) -> int:
    largest = _GRAPH_SEQUENCES[rollout.tensor_parallel_size >= 4]
    return min(largest, rollout.max_running_requests) * _GRAPH_BYTES + _PREFILL_GRAPHS * _PREFILL_GRAPH_BYTES


def _requests(model: ModelSizes, rollout: RolloutConfig) -> int:
    """``ReqToTokenPool``: where each token of each request is, int32 [requests, longest context]."""
    return 4 * rollout.max_running_requests * model.text.max_positions


def _work(model: ModelSizes, rollout: RolloutConfig, dtype: DType) -> int:
    """Prefill of one chunk, without gradients: about four rows of hidden states, one of attention, three of the MLP;
    the tower over as many image tokens; and logits of a full batch in float32, twice, on every rank."""
    text, vision, tensor, item = model.text, model.vision, rollout.tensor_parallel_size, ITEM_BYTES[dtype]
    row = 4 * text.hidden + ((text.heads + 2 * text.groups) * text.head_dim + 3 * text.inner) // tensor
    patch = 8 * vision.hidden + (3 * vision.hidden + 3 * vision.inner) // tensor
    logits = 2 * 4 * rollout.max_running_requests * text.vocab_size
    return _PREFILL_TOKENS * (row + vision.merged * patch) * item + logits
