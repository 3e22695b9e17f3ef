"""The pure half of ``mmrl doctor parity``: what is called different, where first, and in which words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_mmrl.config import ConfigError
from megatron_mmrl.doctor.parity_compare import (
    StageError,
    TensorDifference,
    difference,
    explain_trace,
    first_difference,
    kind_of_difference,
    relative_error,
    stage_errors,
    stage_of,
)

WEIGHTS = (
    *(f"visual.patch_embed.{n}" for n in range(3)),
    "visual.merger.ln_q.weight",
    "model.layers.0.mlp.up_proj.weight",
)


def f32(*values):
    return np.array(values, dtype=np.float32)


def errors(**stages):
    return [StageError(stage=name, error=error, allowed=1e-4) for name, error in stages.items()]


def test_difference_over_all_tokens() -> None:
    found = difference([f32(1, 2), f32(5)], [f32(1, 2.5), f32(4)])
    assert (found.max, found.mean) == (1.0, 0.5)
    assert difference([f32(1, math.nan)], [f32(1, 1)]).max == math.inf
    with pytest.raises(ValueError, match="give pairs"):
        difference([f32(1, 2)], [f32(1)])
    with pytest.raises(ValueError, match="give pairs"):
        difference([], [])


def test_relative_error_is_that_of_the_worst_row() -> None:
    reference = np.array([[3, 4], [30, 40]], dtype=np.float32)
    ours = reference + f32(0, 1)
    assert relative_error(ours, reference) == pytest.approx(1 / 5)  # not 1 / 50
    assert relative_error(reference, reference) == 0
    assert relative_error(reference[:1], reference) == math.inf
    assert relative_error(reference * math.nan, reference) == math.inf
    assert relative_error(f32(0, 0)[None], f32(0, 0)[None]) == 0


def test_a_stage_may_be_off_by_the_tolerance_or_twice_its_own_rounding_but_positions_not_at_all() -> None:
    reference = {"positions": f32(7, 7, 7)[None], "model.layers.0": f32(1, 0)[None], "model.norm": f32(1, 0)[None]}
    rounded = {**reference, "model.norm": f32(1.1, 0)[None]}
    ours = {
        "positions": f32(7, 7, 7.00001)[None],
        "model.layers.0": f32(1.1, 0)[None],
        "model.norm": f32(1.19, 0)[None],
    }
    found = stage_errors(ours, reference, rounded, 0.05)
    assert [(e.stage, round(e.allowed, 3), e.error > e.allowed) for e in found] == [
        ("positions", 0.0, True),
        ("model.layers.0", 0.05, True),
        ("model.norm", 0.2, False),
    ]
    del ours["positions"]
    first = first_difference(stage_errors(ours, reference, rounded, 0.05))
    assert first is not None
    assert first.stage == "model.layers.0"
    assert first_difference(stage_errors(rounded, reference, rounded, 0.05)) is None


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("visual.patch_embed.proj.weight", "visual.patch_embed"),
        ("visual.blocks.11.attn.qkv.bias", "visual.blocks.11"),
        ("visual.merger.mlp.0.weight", "visual.merger"),
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp"),
        ("model.layers.30.post_attention_layernorm.weight", "model.layers.30.mlp"),
        ("model.layers.30.input_layernorm.weight", "model.layers.30.self_attn"),
        ("model.layers.7.self_attn.o_proj.weight", "model.layers.7.self_attn"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_every_tensor_has_a_stage(tensor, stage) -> None:
    assert stage_of(tensor) == stage


def test_how_a_weight_differs() -> None:
    weight = f32(1, 2, 3, 4).reshape(2, 2)
    assert kind_of_difference(weight, weight.copy()) is None
    assert kind_of_difference(weight[::-1], weight) == "holds the checkpoint's numbers in another order"
    assert kind_of_difference(weight * 0, weight) == "is all zeros"
    assert kind_of_difference(weight * math.nan, weight) == "holds NaN"
    assert kind_of_difference(weight + f32(0, 0.5), weight) == "differs by up to 0.5"
    assert kind_of_difference(weight[:1], weight) == "has shape (1, 2) instead of (2, 2)"


def test_the_first_layer_and_its_tensor_are_named() -> None:
    names = tuple(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
    wrong = [
        TensorDifference(names=("model.layers.2.mlp.down_proj.weight",), kind="is all zeros"),
        TensorDifference(names=names, kind="holds the checkpoint's numbers in another order"),
    ]
    found = errors(**{"model.layers.0.mlp": 1e-6, "model.layers.1.self_attn": 0.5, "model.layers.2.mlp": 0.7})
    text = explain_trace(found, wrong, WEIGHTS)
    assert text.startswith(
        "first differs at model.layers.1.self_attn (relative error 0.5): model.layers.1.self_attn.q_proj.weight,"
    )
    assert text.endswith("self_attn.v_proj.weight holds the checkpoint's numbers in another order")
    assert "layers.2" not in text


def test_a_part_that_is_wrong_everywhere_was_not_loaded() -> None:
    wrong = [TensorDifference(names=(f"visual.patch_embed.{n}",), kind="is all zeros") for n in range(3)]
    found = errors(**{"visual.patch_embed": 1.0, "visual.merger": 1.0})
    text = explain_trace(found, wrong, WEIGHTS)
    assert "not loaded" not in text  # the merger is right
    merger = TensorDifference(names=("visual.merger.ln_q.weight",), kind="is all zeros")
    text = explain_trace(found, [*wrong[:2], merger], WEIGHTS)
    assert text.endswith("(3 of 4 weights of the vision tower, in all of its stages: it was not loaded)")
    assert "so do 1 more there" in explain_trace(found, [*wrong, wrong[0]], WEIGHTS)


@pytest.mark.parametrize(
    ("stages", "wrong", "words"),
    [
        ({"positions": 0.3, "model.layers.0": 0.5}, (), "positions are not Hugging Face's"),
        ({"embeddings": 0.5}, (), "where image features are put in differs"),
        ({"model.layers.0.mlp": 0.5}, (), "computation differs, or the order of rows"),
        ({"model.norm": 0.0}, ("lm_head.weight",), "first differs behind model.norm: lm_head.weight is all zeros"),
        ({"model.norm": 0.0}, (), "no stage differs on its own"),
    ],
)
def test_other_causes(stages, wrong, words) -> None:
    differences = [TensorDifference(names=(name,), kind="is all zeros") for name in wrong]
    assert words in explain_trace(errors(**stages), differences, WEIGHTS)


def test_layouts_are_read() -> None:
    from megatron_mmrl.commands.doctor_parity import parse_layout

    sizes = parse_layout("tensor=2,virtual-pipeline=2,pipeline=4,context=2,data=3")
    assert (sizes.world_size, sizes.virtual_pipeline_model_parallel_size) == (48, 2)
    assert parse_layout("").world_size == 1
    for text in ("tensor", "tensor=x", "tensors=2", "tensor=0", "virtual-pipeline=2"):
        with pytest.raises(ConfigError, match=f"--layout {text}"):
            parse_layout(text)
