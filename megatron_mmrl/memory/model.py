"""The sizes of a model that memory depends on, from the values of its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DType = Literal["float32", "bfloat16"]
ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """The decoder; letters are those of the formulas."""

    layers: int
    hidden: int  # h
    inner: int  # F, of the gated MLP
    heads: int
    groups: int  # key/value heads
    head_dim: int  # d
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModel:
    """The tower and its merger."""

    depth: int
    hidden: int
    inner: int
    merged: int  # patches that become one image token
    patch_values: int  # numbers of a patch as it is read
    pixels_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Both parts."""

    text: TextModel
    vision: VisionModel


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """From ``config.json``; text sizes nested under ``text_config`` or flat. Raises KeyError where one is missing."""
    text, vision = config.get("text_config") or config, config["vision_config"]
    side = vision["patch_size"] * vision["spatial_merge_size"]
    return ModelSizes(
        text=TextModel(
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            inner=text["intermediate_size"],
            heads=text["num_attention_heads"],
            groups=text["num_key_value_heads"],
            head_dim=text["hidden_size"] // text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text["max_position_embeddings"],
        ),
        vision=VisionModel(
            depth=vision["depth"],
            hidden=vision["hidden_size"],
            inner=vision["intermediate_size"],
            merged=vision["spatial_merge_size"] ** 2,
            patch_values=vision.get("in_channels", 3)
            * vision.get("temporal_patch_size", 2)
            * vision["patch_size"] ** 2,
            pixels_per_token=side * side,
        ),
    )
