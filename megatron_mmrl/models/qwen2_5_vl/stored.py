"""Qwen2.5-VL in a Megatron distributed checkpoint.

The language model has the names and shapes that mcore's ``GPTModel.sharded_state_dict()`` asks for (0.16.1), so any
script that builds a ``GPTModel`` reads it; those are the names of Transformer Engine's layers, whichever layers are
used. The vision tower lies beside it under ``visual.``, as Hugging Face names it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.models.hf_io import to_original
from megatron_mmrl.models.qwen2_5_vl.config import load_config, text_sizes
from megatron_mmrl.models.qwen2_5_vl.weights import weight_table
from megatron_mmrl.models.stored import StoredModel, StoredPart
from megatron_mmrl.parallel.sharding import Vocab

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig

_PREFIX = "language_model."
_LAYER = re.compile(r"(decoder\.layers)\.(\d+)\.(.+)")
_LAYER_TENSORS = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_LAYER_OBJECTS = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def describe(path: Path) -> StoredModel:
    """Of the model whose ``config.json`` is in ``path``.

    Raises:
        ValueError: the model uses something that is not implemented here.
    """
    config = load_config(path)
    sizes = text_sizes(config)
    shapes = hf_shapes(config)
    num_layers = config.text_config.num_hidden_layers
    names = [name for name in shapes if name.startswith("visual.")]
    names += [_PREFIX + key for key in _language_keys(num_layers, sizes.tied)]
    table = weight_table(names, sizes, first_layer=0)
    return StoredModel(
        shapes=shapes,
        num_layers=num_layers,
        parts=tuple(_part(name, table) for name in names),
        empty_objects=_empty_objects(num_layers),
        copies={"lm_head.weight": "model.embed_tokens.weight"} if sizes.tied else {},
        arguments=_arguments(config),
    )


def hf_shapes(config: Qwen2_5_VLConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the Hugging Face model, by original name, a tied output layer left out.

    The model is transformers' own, on meta tensors: it takes no memory.
    """
    declare_torchvision_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return {to_original(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _language_keys(num_layers: int, tied: bool) -> list[str]:
    layers = [f"decoder.layers.{layer}.{name}" for layer in range(num_layers) for name in _LAYER_TENSORS]
    output = [] if tied else ["output_layer.weight"]
    return ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", *output]


def _part(name: str, table: dict[str, Any]) -> StoredPart:
    key, entry = name.removeprefix(_PREFIX), table[name]
    if isinstance(entry.rule, Vocab):
        entry = replace(entry, rule=replace(entry.rule, padded=False))
    match = _LAYER.fullmatch(key)
    if match is None:
        return StoredPart(key=key, layer=None, entry=entry)
    return StoredPart(key=f"{match[1]}.{match[3]}", layer=int(match[2]), entry=entry)


def _empty_objects(num_layers: int) -> tuple[str, ...]:
    layers = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in range(num_layers)
        for module in _LAYER_OBJECTS
    ]
    return (*layers, "decoder.final_layernorm._extra_state/shard_0_1")


def _arguments(config: Qwen2_5_VLConfig) -> dict[str, Any]:
    text = config.text_config
    return {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": text.hidden_size // text.num_attention_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "padded_vocab_size": text.vocab_size,
        "add_position_embedding": False,
        "position_embedding_type": "mrope",
        "mrope_section": list(text.rope_parameters["mrope_section"]),
        "rotary_base": text.rope_parameters["rope_theta"],
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": text.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
    }
