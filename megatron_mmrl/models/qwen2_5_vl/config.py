"""A Qwen2.5-VL checkpoint's configuration, as sizes and as Megatron's ``TransformerConfig``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mmrl.config.checks import require
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.models.qwen2_5_vl.sizes import TextSizes
from megatron_mmrl.parallel.device import dtype_of

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


def load_config(path: Path) -> Qwen2_5_VLConfig:
    """Read ``config.json``, with the text part nested or flat.

    Raises:
        ValueError: the checkpoint uses something that is not implemented here.
    """
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig.from_pretrained(path, local_files_only=True)
    text = config.text_config
    require(text.hidden_act == "silu", f"{path}: hidden_act={text.hidden_act!r} is not supported, only 'silu'")
    rope = text.rope_parameters["rope_type"]
    require(rope == "default", f"{path}: rope_type={rope!r} is not supported, only 'default' with an mrope_section")
    require(text.sliding_window is None, f"{path}: use_sliding_window is not supported")
    return config


def text_sizes(config: Qwen2_5_VLConfig) -> TextSizes:
    """The sizes in ``config``."""
    text = config.text_config
    return TextSizes(
        heads=text.num_attention_heads,
        groups=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        tied=config.tie_word_embeddings,
    )


def transformer_config(config: Qwen2_5_VLConfig, parallel: ParallelConfig, model: ModelConfig) -> TransformerConfig:
    """Megatron's view of the language model.

    Weights are left uninitialised (they are loaded). ``calculate_per_token_loss`` makes gradients plain sums over
    micro-batches, data- and context-parallel ranks. Every fused kernel is off: they need CUDA, and two of them Apex.
    """
    text, dtype = config.text_config, dtype_of(model.dtype)
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        **_exchange(parallel),
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_recompute(model),
    )


def _exchange(parallel: ParallelConfig) -> dict[str, bool]:
    """How stages exchange activations and gradients.

    With two stages the next one is also the previous one, and the interleaved schedule sends both ways at once: in
    batches (Megatron's default, seen in 0.16.1 on gloo) gradients are then taken for activations, silently.
    """
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {"batch_p2p_comm": not interleaved, "overlap_p2p_comm": interleaved}


def _recompute(model: ModelConfig) -> dict[str, object]:
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _leave_as_is(_: torch.Tensor) -> None:
    """Initialises nothing."""
