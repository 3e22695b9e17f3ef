"""The memory estimate: shapes against transformers, parameters against built models, formulas worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mmrl.config import Config, load_config
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.doctor.layout import inspect_layout
from megatron_mmrl.doctor.layout_model import hf_shapes
from megatron_mmrl.memory.engine import CONTEXT_BYTES, engine_bytes, kv_token_bytes
from megatron_mmrl.memory.estimate import Machine, StageEstimate, estimate, least_estimate
from megatron_mmrl.memory.model import ModelSizes, model_sizes
from megatron_mmrl.memory.parameters import buffer_elements, parameter_bytes, stage_parameters
from megatron_mmrl.models.known import config_dir, known_model
from megatron_mmrl.models.registry import read_hf_config, tensor_shapes

RECIPES = Path(__file__).parents[2] / "configs"
MODELS = ("qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_vl_32b", "qwen2_5_vl_72b")
GIB = 1 << 30


def sizes(name: str) -> ModelSizes:
    with config_dir(name) as path:
        return model_sizes(read_hf_config(path))


@pytest.fixture
def seven() -> Iterator[Config]:
    """The recipe of the 7B, for 8 GPUs."""
    with config_dir("qwen2_5_vl_7b") as path:
        yield load_config(RECIPES / "qwen2_5_vl_7b.yaml", [f"model.path={path}"])


def machine(gpus: int = 8, memory: float = 80) -> Machine:
    return Machine(gpus=gpus, gpus_per_node=8, gpu_memory_gib=memory)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_transformers(name: str) -> None:
    with config_dir(name) as path:
        assert tensor_shapes(path) == hf_shapes(path)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_of_the_tiny_model(tmp_path: Path, tied: bool) -> None:
    from megatron_mmrl.models.tiny import make_tiny_checkpoint

    make_tiny_checkpoint(tmp_path, tied=tied)
    assert tensor_shapes(tmp_path) == hf_shapes(tmp_path)


@pytest.mark.parametrize(
    ("name", "freeze", "parallel"),
    [
        ("qwen2_5_vl_3b", [], {"tensor": 2, "pipeline": 2}),  # tied: both stages hold the embedding
        ("qwen2_5_vl_3b", ["vision"], {"tensor": 8}),  # more ranks than key/value heads
        ("qwen2_5_vl_7b", ["vision", "merger"], {"tensor": 4, "pipeline": 2, "virtual_pipeline": 2}),
    ],
)
def test_parameters_are_those_of_the_models_that_are_built(name: str, freeze: list[str], parallel: dict) -> None:
    layout = ParallelConfig(**{f"{key}_model_parallel_size": value for key, value in parallel.items()})
    with config_dir(name) as path:
        model = ModelConfig(path=str(path), dtype="bfloat16", freeze=freeze)
        held = stage_parameters(model, layout)
        built = inspect_layout(model, layout, ranks=range(0, layout.world_size, layout.tensor_model_parallel_size))
    assert [(kind.num_parameters, kind.num_trained) for kind in built.kinds] == [
        (stage.elements, stage.trained) for stage in held
    ]


def test_bytes_of_7b_by_hand() -> None:
    # (2 + 4 + 12 / 4) bytes of 8,292,166,656 parameters, halved but for 676,550,144 of the tower and norms.
    with config_dir("qwen2_5_vl_7b") as path:
        (held,) = stage_parameters(
            ModelConfig(path=str(path)), ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=4)
        )
    whole = 676_550_144 + 57 * 3584
    assert held.elements == (8_292_166_656 - whole) // 2 + whole
    assert held.trained == held.elements
    assert 0 <= held.buffered - held.trained < 64 * 1000
    found = parameter_bytes(held, "bfloat16", 4)
    assert found.weights == 2 * held.buffered
    assert found.gradients == 4 * held.buffered
    assert found.optimizer == 3 * held.trained
    plain = parameter_bytes(held, "float32", 4, distributed=False)
    assert (plain.weights, plain.optimizer) == (4 * held.elements, 8 * held.trained)


def test_buffers_are_aligned_as_megatron_aligns_them() -> None:
    # From the last: 0-10, then from 64 to 164, then from 192 to 193; a bucket ends at a multiple of lcm(3, 128).
    assert buffer_elements([1, 100, 10], (), ranks=3, bucket=None) == 384
    # Closed after 164 numbers (at 384), and again at the end.
    assert buffer_elements([1, 100, 10], (), ranks=3, bucket=150) == 768
    # The middle one alone: 0-10 | 128-228 | 256-257, by multiples of 128.
    assert buffer_elements([1, 100, 10], {1}, ranks=1, bucket=None) == 384
    assert buffer_elements([], (), ranks=4, bucket=None) == 0


def test_kv_cache_of_a_token() -> None:
    # Keys and values of every layer: 2 x 28 x 4 x 128 x 2 bytes, and so on.
    assert [kv_token_bytes(sizes(name), "bfloat16", 1) for name in MODELS] == [36864, 57344, 262144, 327680]
    assert kv_token_bytes(sizes("qwen2_5_vl_72b"), "bfloat16", 8) == 327680 // 8
    assert kv_token_bytes(sizes("qwen2_5_vl_7b"), "bfloat16", 4) == 57344 // 4
    assert kv_token_bytes(sizes("qwen2_5_vl_3b"), "bfloat16", 8) == 36864 // 2  # each rank repeats one of two heads


def test_size_of_the_kv_cache() -> None:
    model, device = sizes("qwen2_5_vl_7b"), 80 * GIB
    shared = engine_bytes(
        model, RolloutConfig(mem_fraction_static=0.5), "bfloat16", weights=16 * GIB, device_bytes=device
    )
    assert shared.kv_tokens == ((device - CONTEXT_BYTES) // 2 - 16 * GIB) // 57344
    fixed = engine_bytes(model, RolloutConfig(max_total_tokens=1000), "bfloat16", weights=0, device_bytes=device)
    assert (fixed.kv_tokens, fixed.kv_cache) == (1000, 1001 * 57344)
    none = engine_bytes(
        model, RolloutConfig(mem_fraction_static=0.1), "bfloat16", weights=16 * GIB, device_bytes=device
    )
    assert none.kv_tokens < 0
    assert none.kv_cache == 0


def training(config: Config, **machines: int) -> dict[str, int]:
    return dict(estimate(config, machine(config.parallel.world_size, **machines)).worst.training)


def test_an_equal_layout_shares_the_language_model(seven: Config) -> None:
    four = {"tensor_model_parallel_size": 4, "data_parallel_size": 2}
    aligned = replace(
        seven,
        parallel=replace(seven.parallel, **four),
        rollout=replace(seven.rollout, tensor_parallel_size=4, num_engines=2),
    )
    # As many ranks as key/value heads: even QKV is the trainer's own. The engine cuts the tower, the trainer does not.
    tower = 676_550_144 * 2
    assert 0.2 * tower < training(aligned)["arena"] < 0.3 * tower
    apart = replace(aligned, reshard=replace(aligned.reshard, method="reference"))
    assert training(apart)["arena"] > 8_292_166_656 * 2 / 4


def test_what_makes_training_smaller(seven: Config) -> None:
    base = training(seven)
    assert base["images"] == 0
    again = training(replace(seven, model=replace(seven.model, recompute="full")))
    assert again["activations"] < base["activations"] / 4
    learns = training(replace(seven, model=replace(seven.model, freeze=[])))
    assert learns["images"] > 5 * GIB
    assert learns["gradients"] > base["gradients"]
    halved = training(replace(seven, trainer=replace(seven.trainer, micro_batch_tokens=6144)))
    assert halved["activations"] < 0.8 * base["activations"]
    penalised = training(replace(seven, algorithm=replace(seven.algorithm, kl_coef=0.1)))
    assert penalised["reference"] == pytest.approx(base["weights"], rel=1e-4)
    wider = replace(seven, parallel=replace(seven.parallel, data_parallel_size=8))
    spread = training(replace(wider, rollout=replace(wider.rollout, num_engines=8)))
    assert spread["optimizer"] == pytest.approx(base["optimizer"] / 2, rel=1e-6)
    assert spread["activations"] == base["activations"]


def test_what_is_there_when(seven: Config) -> None:
    (stage,) = estimate(seven, machine()).stages
    assert isinstance(stage, StageEstimate)
    assert stage.start["optimizer"] == pytest.approx(stage.training["optimizer"] / 3, rel=1e-6)  # no moments yet
    assert "optimizer" not in stage.rollout
    assert "gradients" not in stage.rollout
    assert stage.rollout["kv_cache"] == stage.start["kv_cache"] > 0
    assert "kv_cache" not in stage.training
    assert stage.peak == sum(stage.start.values())


def test_the_quick_estimate_is_never_above_the_whole_one(seven: Config) -> None:
    least, whole = least_estimate(seven, machine()), estimate(seven, machine())
    assert least.worst.peak + whole.worst.arena == whole.worst.peak
    assert whole.worst.arena > 0


def test_host_memory_of_a_node(seven: Config) -> None:
    plan = estimate(seven, machine())
    assert plan.host.optimizer == 8 * plan.worst.parameters.optimizer
    assert plan.host.caches == 8 * 2 * GIB  # prompts, and features of the frozen tower


def test_impossible_layouts_are_refused(seven: Config) -> None:
    with pytest.raises(ValueError, match="tensor_model_parallel_size=8 does not fit the model"):
        estimate(replace(seven, parallel=replace(seven.parallel, tensor_model_parallel_size=8)), machine(32))
    one = replace(seven.rollout, num_engines=1)
    wide = replace(seven.parallel, data_parallel_size=8)
    with pytest.raises(ValueError, match="on nodes"):
        estimate(replace(seven, parallel=wide, rollout=one), Machine(gpus=16, gpus_per_node=1, gpu_memory_gib=80))


def test_models_are_known_by_name() -> None:
    assert known_model("models/Qwen2.5-VL-7B-Instruct") == "qwen2_5_vl_7b"
    assert known_model("qwen2_5_vl_32b") == "qwen2_5_vl_32b"
    assert known_model("models/Qwen2.5-VL-72B-Instruct/") == "qwen2_5_vl_72b"
    assert known_model("Qwen2.5-VL-7Bigger") is None
    assert known_model("runs/prepared/model") is None
