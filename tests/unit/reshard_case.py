"""A model small enough to number every element, in any pair of layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reshard_bytes import least_sum
from megatron_mmrl.models.qwen2_5_vl.config import TextSizes
from megatron_mmrl.models.qwen2_5_vl.engine_weights import engine_table
from megatron_mmrl.models.qwen2_5_vl.weights import stage_table
from megatron_mmrl.parallel.geometry import Placement, Rect, Shape, as_matrix
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.fragments import EngineSide, Held, TrainerSide
from megatron_mmrl.reshard.plan import Planner

# 8 heads in 2 groups; a vision MLP that SGLang pads (12 -> 16) and a vocabulary that both sides pad to 128.
CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 75,
    "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 12},
}


def hf_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the whole model, worked out from the layers' definitions."""
    hidden, vocab, ffn = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    for name in ("k", "v"):
        layer |= {f"self_attn.{name}_proj.weight": (keys, hidden), f"self_attn.{name}_proj.bias": (keys,)}
    shapes = vision_shapes(config["vision_config"], hidden) | {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.get("tie_word_embeddings") else shapes | {"lm_head.weight": (vocab, hidden)}


def vision_shapes(vision: Mapping[str, Any], out: int) -> dict[str, Shape]:
    width, ffn = vision["hidden_size"], vision["intermediate_size"]
    merged = 4 * width
    block = {
        "norm1": ((width,),),
        "norm2": ((width,),),
        "attn.qkv": ((3 * width, width), (3 * width,)),
        "attn.proj": ((width, width), (width,)),
        "mlp.gate_proj": ((ffn, width), (ffn,)),
        "mlp.up_proj": ((ffn, width), (ffn,)),
        "mlp.down_proj": ((width, ffn), (width,)),
    }
    modules = {f"blocks.{number}.{name}": kinds for number in range(vision["depth"]) for name, kinds in block.items()}
    modules |= {"patch_embed.proj": ((width, 3, 2, 14, 14),), "merger.ln_q": ((width,),)}
    modules |= {"merger.mlp.0": ((merged, merged), (merged,)), "merger.mlp.2": ((out, merged), (out,))}
    return {
        f"visual.{name}.{kind}": shape
        for name, kinds in modules.items()
        for kind, shape in zip(("weight", "bias"), kinds, strict=False)
    }


def planner_for(
    config: Mapping[str, Any], layout: ParallelLayout, *, tensor: int, engines: int = 1, whole_encoder: bool = False
) -> Planner:
    """The plan from ``layout`` to engines of ``tensor`` ranks."""
    shapes = hf_shapes(config)
    heads = config["num_attention_heads"]
    sizes = TextSizes(
        heads=heads,
        groups=config["num_key_value_heads"],
        head_dim=config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
    )
    vision_names = [name for name in shapes if name.startswith("visual.")]
    rows = stage_table(sizes, config["num_hidden_layers"], vision_names, layout)
    held = tuple(Held(stage=stage, chunk=chunk, entry=entry) for stage, chunk, entry in rows)
    return Planner(
        TrainerSide(layout=layout, held=held),
        EngineSide(table=tuple(engine_table(config, whole_encoder=whole_encoder)), tensor=tensor, engines=engines),
        shapes,
    )


def numbered(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Full tensors whose elements are all different, and none 0."""
    tensors, first = {}, 1
    for name, shape in shapes.items():
        count = math.prod(shape)
        tensors[name] = torch.arange(first, first + count).view(shape)
        first += count
    return tensors


def shards(planner: Planner, full: Mapping[str, Tensor], stage: int, rank: int) -> dict[int, Tensor]:
    """What a trainer rank holds, made by the sharding rules themselves: row of ``held`` -> matrix."""
    result = {}
    for number, held in enumerate(planner.trainer.held):
        if held.stage == stage:
            parts = [full[name] for name in held.entry.hf_names]
            shard = held.entry.rule.split(parts, rank, planner.trainer.layout.tensor)
            result[number] = shard.reshape(as_matrix(tuple(shard.shape)))
    return result


def filled(placement: Placement, parts: list[Tensor]) -> Tensor:
    """The engine's parameter, as a matrix."""
    result = torch.zeros(as_matrix(placement.shape), dtype=torch.int64)
    for piece in placement.pieces:
        matrix = parts[piece.tensor].reshape(as_matrix(tuple(parts[piece.tensor].shape)))
        cut(result, piece.at).copy_(cut(matrix, piece.of))
    return result


def cut(matrix: Tensor, rect: Rect) -> Tensor:
    return matrix[rect.top : rect.bottom, rect.left : rect.right]


def least_wire_elements(planner: Planner, full: Mapping[str, Tensor]) -> int:
    """Counted element by element over every way to place the engine ranks; no replica helps but the own memory."""
    layout, engine = planner.trainer.layout, planner.engine
    share, node = layout.world_size // engine.engines, min(layout.world_size, planner.trainer.ranks_per_node)
    size = node if node % share == 0 and layout.world_size % node == 0 else share
    total = 0
    needed = [
        np.concatenate(
            [
                np.unique(matrix[matrix > 0].numpy())
                for entry, placement in zip(engine.table, planner.fragments.placements(rank), strict=True)
                for matrix in [filled(placement, [full[name] for name in entry.hf_names])]
            ]
        )
        for rank in range(engine.tensor)
    ]
    for first in range(0, layout.world_size, size):
        held = []
        for device in range(first, first + size):
            at = layout.coordinates(device)
            own = shards(planner, full, at.pipeline, at.tensor).values()
            held.append(np.concatenate([matrix.flatten().numpy() for matrix in own]))
        missing = np.array([[np.isin(want, have, invert=True).sum() for have in held] for want in needed])
        total += least_sum(np.repeat(missing, size // share, axis=0))
    return total
