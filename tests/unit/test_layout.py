"""Rank order, and layouts that a model cannot be cut into."""

import pytest

from megatron_mmrl.config import Config
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.parallel.layout import Coordinates, ParallelLayout, check_layout

# Sizes of the published 7B model.
TEXT = {
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
}
VISION = {"num_heads": 16}
NESTED = {"text_config": TEXT, "vision_config": VISION}


def config(engine_tensor: int = 1, **parallel: int) -> Config:
    return Config(
        model=ModelConfig(path="m"),
        parallel=ParallelConfig(**parallel),
        rollout=RolloutConfig(tensor_parallel_size=engine_tensor),
    )


def test_neighbours_are_tensor_parallel_and_stages_farthest_apart() -> None:
    layout = ParallelLayout(tensor=2, context=2, data=3, pipeline=2)
    assert layout.world_size == 24
    assert layout.coordinates(0) == Coordinates(tensor=0, context=0, data=0, pipeline=0)
    assert layout.coordinates(1) == Coordinates(tensor=1, context=0, data=0, pipeline=0)
    assert layout.coordinates(2) == Coordinates(tensor=0, context=1, data=0, pipeline=0)
    assert layout.coordinates(4) == Coordinates(tensor=0, context=0, data=1, pipeline=0)
    assert layout.coordinates(12) == Coordinates(tensor=0, context=0, data=0, pipeline=1)
    assert layout.coordinates(23) == Coordinates(tensor=1, context=1, data=2, pipeline=1)


def test_rank_inverts_coordinates() -> None:
    layout = ParallelLayout(tensor=2, context=2, data=3, pipeline=2)
    assert [layout.rank(layout.coordinates(rank)) for rank in range(24)] == list(range(24))


def test_a_rank_or_place_outside_is_refused() -> None:
    layout = ParallelLayout(tensor=2)
    with pytest.raises(ValueError, match="rank 2 is outside the world of 2 ranks"):
        layout.coordinates(2)
    with pytest.raises(ValueError, match="data index 1 is outside the group of size 1"):
        layout.rank(Coordinates(tensor=0, context=0, data=1, pipeline=0))


def test_layout_of_a_config() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=7,
        data_parallel_size=3,
    )
    layout = ParallelLayout.from_config(parallel)
    assert layout == ParallelLayout(tensor=4, pipeline=2, virtual_pipeline=7, data=3)
    assert layout.world_size == parallel.world_size == 24


@pytest.mark.parametrize("hf_config", [NESTED, {**TEXT, "vision_config": VISION}], ids=["nested", "flat"])
def test_layouts_that_fit(hf_config: dict) -> None:
    check_layout(hf_config, config())
    check_layout(hf_config, config(4, tensor_model_parallel_size=4, pipeline_model_parallel_size=7))
    check_layout(hf_config, config(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=7))
    check_layout(hf_config, config(context_parallel_size=3))


def test_tensor_ranks_may_share_key_value_heads() -> None:
    """The published 3B model: 16 heads, 2 of keys and values."""
    sizes = {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
    }
    model = {"text_config": sizes, "vision_config": VISION}
    for tensor in (1, 2, 4, 8, 16):
        check_layout(model, config(tensor_model_parallel_size=tensor))
    with pytest.raises(ValueError, match=r"num_key_value_heads=3; use one of \[1\]"):
        check_layout(
            {**model, "text_config": {**sizes, "num_key_value_heads": 3}}, config(tensor_model_parallel_size=4)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"tensor_model_parallel_size=3 .* num_attention_heads=28, .* \[1, 2, 4\]"),
        ({"tensor_model_parallel_size": 7}, r"tensor_model_parallel_size=7 .* num_key_value_heads=4; .* \[1, 2, 4\]"),
        ({"tensor_model_parallel_size": 8}, r"tensor_model_parallel_size=8 .* num_attention_heads=28, .* \[1, 2, 4\]"),
        ({"pipeline_model_parallel_size": 8}, r"pipeline_model_parallel_size=8 .* num_hidden_layers=28 .* 14, 28\]"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            r"virtual_pipeline_model_parallel_size=3 does not divide the 14 layers .* use one of \[2, 7, 14\]",
        ),
        ({"engine_tensor": 7}, r"rollout.tensor_parallel_size=7 .* num_heads=16.* use one of \[1, 2, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(NESTED, config(**settings))


def test_engine_may_repeat_key_value_heads() -> None:
    model = {"text_config": {**TEXT, "num_attention_heads": 16}, "vision_config": VISION}
    check_layout(model, config(8))  # 4 heads on 8 ranks: each twice
    with pytest.raises(ValueError, match=r"num_key_value_heads=6; use one of \[1, 2\]"):
        check_layout(
            {"text_config": {**model["text_config"], "num_key_value_heads": 6}, "vision_config": VISION}, config(4)
        )
