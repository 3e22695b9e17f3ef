"""Sizes of a Qwen2.5-VL, and the shape of each of its tensors, from the values of a ``config.json``. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSizes:
    """What the sharding rules need to know of the language model."""

    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    tied: bool
    """The output layer is the input embedding."""


def text_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of ``config.json``, which is nested under ``text_config`` or flat."""
    return config.get("text_config") or config


def text_sizes(config: Mapping[str, Any]) -> TextSizes:
    """The sizes in ``config``."""
    text = text_values(config)
    return TextSizes(
        heads=text["num_attention_heads"],
        groups=text["num_key_value_heads"],
        head_dim=text["hidden_size"] // text["num_attention_heads"],
        vocab_size=text["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
    )


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Shape of every tensor of the Hugging Face model, by original name, a tied output layer left out.

    The same as ``stored.hf_shapes``, which asks transformers.
    """
    return dict([*_vision(config["vision_config"]), *_text(config)])


def _text(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    text, sizes = text_values(config), text_sizes(config)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    yield "model.embed_tokens.weight", (sizes.vocab_size, hidden)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", sizes.heads), ("k", sizes.groups), ("v", sizes.groups)):
            yield from _linear(f"{prefix}self_attn.{name}_proj", heads * sizes.head_dim, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, sizes.heads * sizes.head_dim)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not sizes.tied:
        yield "lm_head.weight", (sizes.vocab_size, hidden)


def _vision(vision: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    yield (
        "visual.patch_embed.proj.weight",
        (hidden, vision.get("in_channels", 3), vision.get("temporal_patch_size", 2), patch, patch),
    )
    for block in range(vision["depth"]):
        prefix = f"visual.blocks.{block}."
        yield prefix + "norm1.weight", (hidden,)
        yield prefix + "norm2.weight", (hidden,)
        yield from _linear(prefix + "attn.qkv", 3 * hidden, hidden)
        yield from _linear(prefix + "attn.proj", hidden, hidden)
        yield from _linear(prefix + "mlp.gate_proj", inner, hidden)
        yield from _linear(prefix + "mlp.up_proj", inner, hidden)
        yield from _linear(prefix + "mlp.down_proj", hidden, inner)
    yield "visual.merger.ln_q.weight", (hidden,)
    yield from _linear("visual.merger.mlp.0", merged, merged)
    yield from _linear("visual.merger.mlp.2", vision["out_hidden_size"], merged)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", (rows, columns)
    yield name + ".bias", (rows,)
