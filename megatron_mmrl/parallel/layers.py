"""What mcore's decoder is put together from: Transformer Engine's layers on CUDA, else mcore's own and ours.

Both compute the same; Transformer Engine keeps the norm before a linear layer inside that layer, so two parameters have
other names (``models/qwen2_5_vl/weights.py`` knows both).
"""

from __future__ import annotations

import importlib

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_mmrl.parallel.attention import CausalAttention, on_transformer_engine
from megatron_mmrl.parallel.norm import RMSNorm
from megatron_mmrl.parallel.rotary import RotarySelfAttention


def decoder_spec(num_layers: int) -> TransformerBlockSubmodules:
    """A block of ``num_layers`` equal layers with rotary self-attention, gated MLP and RMS norms."""
    return _transformer_engine_spec(num_layers) if on_transformer_engine() else _torch_spec(num_layers)


def _torch_spec(num_layers: int) -> TransformerBlockSubmodules:
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=_attention(
            SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=CausalAttention, linear_proj=RowParallelLinear
            )
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=_mlp(MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
        mlp_bda=get_bias_dropout_add,
    )
    return _block(layer, num_layers, RMSNorm)


def _transformer_engine_spec(num_layers: int) -> TransformerBlockSubmodules:
    importlib.import_module("transformer_engine.pytorch")  # one built for another torch fails here, and says so
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    layer = TransformerLayerSubmodules(  # both norms before a linear layer are part of it
        self_attention=_attention(
            SelfAttentionSubmodules(
                linear_qkv=TELayerNormColumnParallelLinear,
                core_attention=TEDotProductAttention,
                linear_proj=TERowParallelLinear,
            )
        ),
        self_attn_bda=get_bias_dropout_add,
        mlp=_mlp(MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)),
        mlp_bda=get_bias_dropout_add,
    )
    return _block(layer, num_layers, TENorm)


def _attention(submodules: SelfAttentionSubmodules) -> ModuleSpec:
    params = {"attn_mask_type": AttnMaskType.causal}
    return ModuleSpec(module=RotarySelfAttention, params=params, submodules=submodules)


def _mlp(submodules: MLPSubmodules) -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=submodules)


def _block(layer: TransformerLayerSubmodules, num_layers: int, norm: type) -> TransformerBlockSubmodules:
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)
