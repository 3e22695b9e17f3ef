"""Qwen2.5-VL for training: mcore's ``GPTModel`` behind Hugging Face's vision tower.

A chunk returns hidden states, never logits: whoever needs log-probs multiplies them with its shard of the vocabulary,
a few tokens at a time (``output_weight``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.models.qwen2_5_vl.config import load_config, text_sizes, transformer_config
from megatron_mmrl.models.qwen2_5_vl.vision import build_vision
from megatron_mmrl.models.qwen2_5_vl.weights import weight_table
from megatron_mmrl.parallel.attention import CausalAttention, PackedSequences
from megatron_mmrl.parallel.norm import RMSNorm
from megatron_mmrl.parallel.rotary import MultimodalRotary
from megatron_mmrl.parallel.sharding import WeightEntry, padded_vocab_size

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


def build(path: Path, parallel: ParallelConfig, model: ModelConfig) -> list[Qwen25VL]:
    """This rank's model chunks, in pipeline order, on its device; weights are still to be loaded."""
    hf_config = load_config(path)
    return [Qwen25VL(hf_config, transformer_config(hf_config, parallel, model))]


class LanguageModel(GPTModel):
    """The decoder, whose last stage returns normed hidden states of the full sequence instead of logits."""

    def __init__(self, hf_config: Qwen2_5_VLConfig, config: TransformerConfig) -> None:
        text = hf_config.text_config
        super().__init__(
            config,
            _block_spec(config.num_layers // config.pipeline_model_parallel_size),
            vocab_size=padded_vocab_size(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="mrope",
            scatter_embedding_sequence_parallel=False,  # image features go in first
        )
        self.rotary_pos_emb = MultimodalRotary(config.kv_channels, text.rope_parameters["rope_theta"])

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """[S, B, H], under sequence parallelism [S / tp, B, H] -> [B, S, H] on the last stage.

        Each tensor-parallel rank uses the result with its own part of the vocabulary, so its gradients are partial:
        both branches add them up in backward.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            full = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        else:
            full = copy_to_tensor_model_parallel_region(hidden_states)
        return full.transpose(0, 1).contiguous()


class Qwen25VL(MegatronModule):
    """One pipeline stage of the model; Megatron's schedule and gradient functions read its attributes."""

    def __init__(self, hf_config: Qwen2_5_VLConfig, config: TransformerConfig) -> None:
        super().__init__(config)
        self.language_model = LanguageModel(hf_config, config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.language_model.pre_process
        self.post_process = self.language_model.post_process
        self.share_embeddings_and_output_weights = self.language_model.share_embeddings_and_output_weights
        self.visual = build_vision(hf_config, config.params_dtype) if self.pre_process else None
        self.sizes = text_sizes(hf_config)
        self._image_token_id = hf_config.image_token_id

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """What the previous stage sent; called by Megatron's schedule before ``forward``."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Embedding on the first stage, output layer on the last; Megatron adds their gradients when tied."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSequences | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: int64 [B, S]; packed: [1, T]. Under sequence parallelism S is a multiple of the tensor size.
            position_ids: int64 [3, B, S].
            packed_seq_params: from ``parallel.attention.pack``; None: each row is a sequence, padded on the right.
            pixel_values: [N, D], read on the first stage only; None or N = 0: no images.
            image_grid_thw: int64 [I, 3], in patches; images in row-major order of the batch.

        Returns:
            Last stage: final hidden states [B, S, H] after the norm; else what the next stage reads, [S(/tp), B, H].

        Raises:
            ValueError: sequence length, pack or images do not fit together.
        """
        self._check(input_ids, packed_seq_params)
        embeddings = self._embed(input_ids, pixel_values, image_grid_thw) if self.pre_process else None
        return self.language_model(
            input_ids, position_ids, None, decoder_input=embeddings, packed_seq_params=packed_seq_params
        )

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [padded vocab / tp, H]; last stage only. See ``vocab_range``."""
        model = self.language_model
        tied = self.share_embeddings_and_output_weights
        return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight

    def vocab_range(self) -> tuple[int, int]:
        """Ids [first, end) of this rank's rows that exist in the vocabulary; rows beyond are padding."""
        tensor = self.config.tensor_model_parallel_size
        rows = padded_vocab_size(self.sizes.vocab_size, tensor) // tensor
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        return first, min(first + rows, self.sizes.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Full logits [B, S, vocab] on every tensor-parallel rank: for tests, far too large for training."""
        shards = gather_from_tensor_model_parallel_region(hidden @ self.output_weight().T)
        return shards[..., : self.sizes.vocab_size]

    def weight_table(self) -> dict[str, WeightEntry]:
        """Name of each local parameter -> Hugging Face names and sharding rule."""
        first_layer = self.language_model.decoder.layers[0].layer_number - 1
        return weight_table((name for name, _ in self.named_parameters()), self.sizes, first_layer)

    def _check(self, input_ids: Tensor, packed: PackedSequences | None) -> None:
        rows, length = input_ids.shape
        tensor = self.config.tensor_model_parallel_size
        require(
            not self.config.sequence_parallel or length % tensor == 0,
            f"{length} tokens per row cannot be divided over tensor_model_parallel_size={tensor} ranks "
            "(parallel.sequence_parallel=true); pad to a multiple",
        )
        if packed is not None:
            covered = int(packed.cu_seqlens_q[-1])
            require(
                rows == 1 and covered == length,
                f"cu_seqlens cover {covered} tokens of a pack of shape {rows} x {length}; they must cover all of one "
                "row, padding included",
            )

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None) -> Tensor:
        """Token embeddings with image features at the image pads: [S, B, H], scattered under sequence parallelism."""
        embeddings = self.language_model.embedding(input_ids, position_ids=None)
        if pixel_values is not None and pixel_values.shape[0]:
            rows, columns = (input_ids == self._image_token_id).nonzero(as_tuple=True)
            features = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
            require(
                features.shape[0] == rows.shape[0],
                f"the images make {features.shape[0]} features, but {rows.shape[0]} image tokens stand in the batch",
            )
            embeddings = embeddings.index_put((columns, rows), features.to(embeddings.dtype))
        elif torch.is_grad_enabled():
            embeddings = embeddings + self._zero()
        return scatter_to_sequence_parallel_region(embeddings) if self.config.sequence_parallel else embeddings

    def _zero(self) -> Tensor:
        """0 that depends on every vision parameter: without images they still get a gradient, as their peers do."""
        return 0.0 * sum(p.flatten()[0] for p in self.visual.parameters() if p.requires_grad)


def _block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """mcore's layers from mcore's own linear layers and our norm and attention."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=CausalAttention, linear_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
