"""The table of weights: each local Megatron parameter, its Hugging Face names, and how it is sharded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from megatron_mmrl.models.qwen2_5_vl.sizes import TextSizes
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.parallel.sharding import QKV, GateUp, Replicated, Row, Rule, Vocab, WeightEntry

_LAYER_PARAMETERS = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.(.+)")


def weight_table(names: Iterable[str], sizes: TextSizes, first_layer: int) -> dict[str, WeightEntry]:
    """Entries for the parameters ``names`` of a model chunk, in the same order.

    Args:
        names: as in ``Qwen25VL.named_parameters()``.
        first_layer: global number, from 0, of the chunk's local layer 0.

    Raises:
        ValueError: a name that the table does not know.
    """
    layer_rows, top_rows = _layer_rows(sizes), _top_rows(sizes)
    table: dict[str, WeightEntry] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        if name.startswith("visual."):
            table[name] = WeightEntry(hf_names=(name,), rule=Replicated())
        elif name in top_rows:
            table[name] = top_rows[name]
        elif match and match[2] in layer_rows:
            hf_names, rule = layer_rows[match[2]]
            prefix = f"model.layers.{first_layer + int(match[1])}."
            table[name] = WeightEntry(hf_names=tuple(prefix + hf_name for hf_name in hf_names), rule=rule)
        else:
            raise ValueError(f"parameter {name} has no row in the weight table of qwen2_5_vl")
    return table


def stage_table(
    sizes: TextSizes, num_layers: int, vision_names: Sequence[str], layout: ParallelLayout
) -> Iterator[tuple[int, int, WeightEntry]]:
    """(pipeline stage, chunk, entry) of every parameter that a layout's ranks hold, without building a model.

    Args:
        num_layers: of the language model; a multiple of stages x chunks.
        vision_names: the vision tower's tensors, by original name.
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    per_chunk = num_layers // (stages * chunks)
    layer_names = [f"language_model.decoder.layers.{n}.{name}" for n in range(per_chunk) for name in _LAYER_PARAMETERS]
    for chunk, stage in itertools.product(range(chunks), range(stages)):
        names = list(layer_names)
        if chunk == stage == 0:
            names = [*vision_names, "language_model.embedding.word_embeddings.weight", *names]
        if (chunk, stage) == (chunks - 1, stages - 1):
            # A tied output layer on the stage of the embedding is no parameter of its own.
            output = ["language_model.output_layer.weight"] if stages > 1 or not sizes.tied else []
            names += ["language_model.decoder.final_layernorm.weight", *output]
        table = weight_table(names, sizes, first_layer=(chunk * stages + stage) * per_chunk)
        yield from ((stage, chunk, entry) for entry in table.values())


def _layer_rows(sizes: TextSizes) -> dict[str, tuple[tuple[str, ...], Rule]]:
    qkv = QKV(heads=sizes.heads, groups=sizes.groups, head_dim=sizes.head_dim)
    before_attention = (("input_layernorm.weight",), Replicated())
    before_mlp = (("post_attention_layernorm.weight",), Replicated())
    return {
        "input_layernorm.weight": before_attention,
        "self_attention.linear_qkv.layer_norm_weight": before_attention,  # Transformer Engine's name
        "self_attention.linear_qkv.weight": (tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), qkv),
        "self_attention.linear_qkv.bias": (tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), qkv),
        "self_attention.linear_proj.weight": (("self_attn.o_proj.weight",), Row()),
        "pre_mlp_layernorm.weight": before_mlp,
        "mlp.linear_fc1.layer_norm_weight": before_mlp,  # Transformer Engine's name
        "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
        "mlp.linear_fc2.weight": (("mlp.down_proj.weight",), Row()),
    }


def _top_rows(sizes: TextSizes) -> dict[str, WeightEntry]:
    vocab = Vocab(sizes.vocab_size)
    embedding = "model.embed_tokens.weight"
    return {
        "language_model.embedding.word_embeddings.weight": WeightEntry(hf_names=(embedding,), rule=vocab),
        "language_model.decoder.final_layernorm.weight": WeightEntry(
            hf_names=("model.norm.weight",), rule=Replicated()
        ),
        # Tied: the last pipeline stage holds a copy of the embedding, which the first stage exports.
        "language_model.output_layer.weight": WeightEntry(
            hf_names=(embedding if sizes.tied else "lm_head.weight",), rule=vocab, exported=not sizes.tied
        ),
    }
