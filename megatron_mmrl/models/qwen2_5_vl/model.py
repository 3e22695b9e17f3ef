"""Qwen2.5-VL for training: mcore's ``GPTModel`` behind Hugging Face's vision tower.

A chunk returns hidden states, never logits: whoever needs log-probs multiplies them with its shard of the vocabulary,
a few tokens at a time (``output_weight``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.models.qwen2_5_vl.config import load_config, text_sizes, transformer_config
from megatron_mmrl.models.qwen2_5_vl.vision import ImageEncoder, build_vision
from megatron_mmrl.models.qwen2_5_vl.weights import weight_table
from megatron_mmrl.parallel.attention import PackedSequences
from megatron_mmrl.parallel.context import held_tokens
from megatron_mmrl.parallel.hooks import before_use
from megatron_mmrl.parallel.layers import decoder_spec
from megatron_mmrl.parallel.rotary import MultimodalRotary
from megatron_mmrl.parallel.sharding import WeightEntry, padded_vocab_size

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


def build(path: Path, parallel: ParallelConfig, model: ModelConfig) -> list[Qwen25VL]:
    """This rank's model chunks, in pipeline order, on its device; weights are still to be loaded."""
    hf_config = load_config(path)
    config = transformer_config(hf_config, parallel, model)
    stages = range(parallel.virtual_pipeline_model_parallel_size or 1)
    # Without a virtual pipeline mcore wants no stage at all, not stage 0.
    vp_stages = stages if len(stages) > 1 else (None,)
    return [Qwen25VL(hf_config, config, stage, model.image_cache_bytes) for stage in vp_stages]


class LanguageModel(GPTModel):
    """The decoder, whose last stage returns normed hidden states instead of logits."""

    def __init__(self, hf_config: Qwen2_5_VLConfig, config: TransformerConfig, vp_stage: int | None = None) -> None:
        text = hf_config.text_config
        chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        super().__init__(
            config,
            decoder_spec(config.num_layers // chunks),
            vocab_size=padded_vocab_size(text.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=text.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="mrope",
            scatter_embedding_sequence_parallel=False,  # image features go in first
            vp_stage=vp_stage,
        )
        self.rotary_pos_emb = MultimodalRotary(config.kv_channels, text.rope_parameters["rope_theta"])

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """[S, B, H], under sequence parallelism [S / tp, B, H] -> [B, S, H] on the last stage; S: held tokens.

        Each tensor-parallel rank uses the result with its own part of the vocabulary, so its gradients are partial:
        both branches add them up in backward.
        """
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            full = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
            return full.transpose(0, 1).contiguous()
        # Not the other way round: mcore 0.16.1 loses the sum of a gradient that is not contiguous.
        return copy_to_tensor_model_parallel_region(hidden_states.transpose(0, 1).contiguous())


class Qwen25VL(MegatronModule):
    """One pipeline stage of the model; Megatron's schedule and gradient functions read its attributes.

    Args:
        hf_config: the checkpoint's.
        config: what ``transformer_config`` made of it.
        vp_stage: which of this rank's chunks under a virtual pipeline, else None.
        image_cache_bytes: ``model.image_cache_bytes``.
    """

    def __init__(
        self,
        hf_config: Qwen2_5_VLConfig,
        config: TransformerConfig,
        vp_stage: int | None = None,
        image_cache_bytes: int = 0,
    ) -> None:
        super().__init__(config)
        self.vp_stage = vp_stage
        self.language_model = LanguageModel(hf_config, config, vp_stage)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = self.language_model.pre_process
        self.post_process = self.language_model.post_process
        self.share_embeddings_and_output_weights = self.language_model.share_embeddings_and_output_weights
        self.visual = build_vision(hf_config, config.params_dtype) if self.pre_process else None
        readers = parallel_state.get_tensor_and_context_parallel_group()
        self._encode_images = ImageEncoder(self.visual, readers, image_cache_bytes) if self.visual else None
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
        """Run this stage. Every context-parallel rank is given the whole batch and computes the tokens that it holds.

        Args:
            input_ids: int64 [B, S]; packed: [1, T]. Under sequence parallelism S / cp is a multiple of the tensor
                size, under context parallelism S (packed: every sequence) is a multiple of 2 x cp.
            position_ids: int64 [3, B, S].
            packed_seq_params: from ``parallel.attention.pack``; None: each row is a sequence, padded on the right.
            pixel_values: [N, D] on the host, read on the first stage only; None: no images.
            image_grid_thw: int64 [I, 3] on the host, in patches; images in row-major order of the batch.

        Returns:
            Last stage: final hidden states [B, S / cp, H] after the norm, of ``parallel.context.held_tokens``; else
            what the next stage reads, [S / cp (/ tp), B, H].

        Raises:
            ValueError: sequence length, positions, pack or images do not fit together.
        """
        self._check(input_ids, position_ids, packed_seq_params)
        held = self._held(input_ids, packed_seq_params)
        embeddings = self._embed(input_ids, held, pixel_values, image_grid_thw) if self.pre_process else None
        return self.language_model(
            input_ids[:, held],
            position_ids[:, :, held],
            None,
            decoder_input=embeddings,
            packed_seq_params=packed_seq_params,
        )

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [padded vocab / tp, H]; last stage only. See ``vocab_range``."""
        model = self.language_model
        tied = self.share_embeddings_and_output_weights
        before_use(model.output_layer)
        return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight

    def vocab_range(self) -> tuple[int, int]:
        """Ids [first, end) of this rank's rows that exist in the vocabulary; rows beyond are padding."""
        tensor = self.config.tensor_model_parallel_size
        rows = padded_vocab_size(self.sizes.vocab_size, tensor) // tensor
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        return first, min(first + rows, self.sizes.vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Full logits [B, S / cp, vocab] on every tensor-parallel rank: for tests, far too large for training."""
        shards = gather_from_tensor_model_parallel_region(hidden @ self.output_weight().T)
        return shards[..., : self.sizes.vocab_size]

    def weight_table(self) -> dict[str, WeightEntry]:
        """Name of each local parameter -> Hugging Face names and sharding rule."""
        first_layer = self.language_model.decoder.layers[0].layer_number - 1
        return weight_table((name for name, _ in self.named_parameters()), self.sizes, first_layer)

    def _check(self, input_ids: Tensor, position_ids: Tensor, packed: PackedSequences | None) -> None:
        rows, length = input_ids.shape
        context = self.config.context_parallel_size
        tensor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        require(
            length % (context * tensor) == 0,
            f"{length} tokens per row cannot be divided over tensor_model_parallel_size={tensor} "
            f"(parallel.sequence_parallel) x context_parallel_size={context} ranks; pad to a multiple",
        )
        require(
            position_ids.shape == (3, rows, length),
            f"position_ids have shape {tuple(position_ids.shape)}, input_ids {tuple(input_ids.shape)}; every token, "
            "padding included, needs a column of 3 positions",
        )
        if packed is not None:
            require(
                rows == 1 and packed.num_tokens == length,
                f"cu_seqlens cover {packed.num_tokens} tokens of a pack of shape {rows} x {length}; they must cover "
                "all of one row, padding included",
            )
            require(
                packed.context_size == context,
                f"the pack was described for {packed.context_size} context-parallel ranks, there are {context}",
            )

    def _held(self, input_ids: Tensor, packed: PackedSequences | None) -> Tensor:
        """int64 [S / cp]: the columns that this context-parallel rank computes."""
        if packed is not None:
            return packed.held
        rank, size = parallel_state.get_context_parallel_rank(), self.config.context_parallel_size
        return held_tokens(torch.tensor([0, input_ids.shape[1]]), rank, size).to(input_ids.device)

    def _embed(
        self, input_ids: Tensor, held: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None
    ) -> Tensor:
        """Embeddings of held tokens, image features at the pads: [S / cp, B, H], scattered by sequence parallelism."""
        embeddings = self.language_model.embedding(input_ids[:, held], position_ids=None)
        features = self._encode_images(pixel_values, image_grid_thw)
        is_image = input_ids == self._image_token_id
        require(
            features.shape[0] == int(is_image.sum()),
            f"the images make {features.shape[0]} features, but {int(is_image.sum())} image tokens stand in the batch",
        )
        feature_of = (is_image.flatten().cumsum(0) - 1).view_as(input_ids)[:, held]
        rows, columns = is_image[:, held].nonzero(as_tuple=True)
        chosen = features[feature_of[rows, columns]].to(embeddings.dtype)
        embeddings = embeddings.index_put((columns, rows), chosen)
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            # Embedding and tower are frozen. Recomputed layers get gradients only if their input asks for one.
            embeddings.requires_grad_(any(parameter.requires_grad for parameter in self.parameters()))
        return scatter_to_sequence_parallel_region(embeddings) if self.config.sequence_parallel else embeddings
