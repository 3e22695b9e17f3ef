"""SGLang's parameters of a Qwen2.5-VL: their names, the full tensors behind each, and how they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mmrl.parallel.engine_sharding import Columns, EngineEntry, EngineRule, Heads, Rows, VocabRows, Whole

_VISION_MLP_MULTIPLE = 8  # SGLang pads the vision tower's MLP: 3420 -> 3424


def engine_table(config: Mapping[str, Any], *, whole_encoder: bool = False) -> list[EngineEntry]:
    """Every parameter of the engine's model, vision tower first, in the order of the layers.

    Args:
        config: content of ``config.json``; text sizes nested under ``text_config`` or flat.
        whole_encoder: SGLang's ``mm_enable_dp_encoder``: each rank holds the whole vision tower.
    """
    return [*_vision(config["vision_config"], whole=whole_encoder), *_text(config)]


def _text(config: Mapping[str, Any]) -> Iterator[EngineEntry]:
    text = config.get("text_config") or config
    heads = text["num_attention_heads"]
    qkv = Heads(heads, text["num_key_value_heads"], text["hidden_size"] // heads)
    yield _entry("model.embed_tokens.weight", VocabRows())
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        yield _entry(prefix + "input_layernorm.weight", Whole())
        for kind in ("weight", "bias"):
            yield _entry(f"{attention}qkv_proj.{kind}", qkv, *(f"{attention}{x}_proj.{kind}" for x in "qkv"))
        yield _entry(attention + "o_proj.weight", Columns())
        yield _entry(prefix + "post_attention_layernorm.weight", Whole())
        yield _entry(mlp + "gate_up_proj.weight", Rows(), mlp + "gate_proj.weight", mlp + "up_proj.weight")
        yield _entry(mlp + "down_proj.weight", Columns())
    yield _entry("model.norm.weight", Whole())
    if not config.get("tie_word_embeddings", False):
        yield _entry("lm_head.weight", VocabRows())


def _vision(vision: Mapping[str, Any], *, whole: bool) -> Iterator[EngineEntry]:
    heads = vision["num_heads"]
    qkv = Heads(heads, heads, vision["hidden_size"] // heads)
    padded_rows, padded_columns = Rows(_VISION_MLP_MULTIPLE), Columns(_VISION_MLP_MULTIPLE)
    rows = {
        "attn.qkv_proj": ("attn.qkv",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
    yield _entry("visual.patch_embed.proj.weight", Whole())
    for block in range(vision["depth"]):
        prefix = f"visual.blocks.{block}."
        yield _entry(prefix + "norm1.weight", Whole())
        yield _entry(prefix + "norm2.weight", Whole())
        for name, rule in (("attn.qkv_proj", qkv), ("mlp.gate_up_proj", padded_rows)):
            for kind in ("weight", "bias"):
                yield _entry(f"{prefix}{name}.{kind}", rule, *(f"{prefix}{x}.{kind}" for x in rows[name]), whole=whole)
        for name, rule in (("attn.proj", Columns()), ("mlp.down_proj", padded_columns)):
            yield _entry(f"{prefix}{name}.weight", rule, whole=whole)
            yield _entry(f"{prefix}{name}.bias", Whole())
    yield _entry("visual.merger.ln_q.weight", Whole())
    for kind in ("weight", "bias"):
        yield _entry(f"visual.merger.mlp.0.{kind}", Rows(), whole=whole)
    yield _entry("visual.merger.mlp.2.weight", Columns(), whole=whole)
    yield _entry("visual.merger.mlp.2.bias", Whole())


def _entry(name: str, rule: EngineRule, *hf_names: str, whole: bool = False) -> EngineEntry:
    return EngineEntry(name=name, hf_names=hf_names or (name,), rule=rule, divided=not whole)
