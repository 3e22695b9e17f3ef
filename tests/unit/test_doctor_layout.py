"""The layout doctor: totals of the public models, proof of coverage at full size, refusals, and bytes per rank."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_mmrl.commands import doctor_layout
from megatron_mmrl.config import ConfigError
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.doctor.coverage import check_coverage
from megatron_mmrl.doctor.layout import inspect_layout
from megatron_mmrl.doctor.layout_model import hf_shapes
from megatron_mmrl.doctor.layout_nearest import nearest_layouts
from megatron_mmrl.doctor.layout_shards import build_rank
from megatron_mmrl.models.known import MODELS_DIR, config_dir
from megatron_mmrl.parallel.sharding import GateUp

TOTALS = {
    "qwen2_5_vl_3b": (3_754_622_976, "3.75"),
    "qwen2_5_vl_7b": (8_292_166_656, "8.29"),
    "qwen2_5_vl_32b": (33_452_718_336, "33.45"),
    "qwen2_5_vl_72b": (73_410_777_344, "73.41"),
}
SMALL_TEXT = {
    "vocab_size": 250,  # padded to 256
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
SMALL_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 36,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}


def parallel(tensor: int = 1, pipeline: int = 1, virtual: int | None = None, **other: int) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        **other,
    )


def hf_config(name: str = "qwen2_5_vl_7b") -> dict[str, Any]:
    return yaml.safe_load((MODELS_DIR / f"{name}.yaml").read_text())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small tied model with fewer key/value heads than tensor-parallel ranks."""
    config = {**hf_config(), "tie_word_embeddings": True}
    config["text_config"] |= {**SMALL_TEXT, "tie_word_embeddings": True}
    config["vision_config"] |= SMALL_VISION
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def doctor(*words: str) -> int:
    parser = argparse.ArgumentParser()
    doctor_layout.add_arguments(parser)
    return doctor_layout.run(parser.parse_args(words))


@pytest.mark.parametrize("name", TOTALS)
def test_each_public_model_has_its_known_size_and_is_covered(name: str) -> None:
    total, billions = TOTALS[name]
    with config_dir(name) as path:
        report = inspect_layout(ModelConfig(path=str(path), dtype="bfloat16"), ParallelConfig())
    assert report.num_parameters == total
    assert f"{total / 1e9:.2f}" == billions
    assert report.coverage is not None
    assert report.coverage.problems == ()
    assert report.kinds[0].num_parameters == total


def test_7b_over_tensor_and_virtual_pipeline_ranks() -> None:
    with config_dir("qwen2_5_vl_7b") as path:
        report = inspect_layout(ModelConfig(path=str(path), dtype="bfloat16"), parallel(4, 2, 2, data_parallel_size=2))
    assert report.coverage is not None
    assert report.coverage.problems == ()
    assert [kind.ranks for kind in report.kinds[3:5]] == [(3, 7), (8, 12)]
    first, last = report.kinds[0], report.kinds[-1]
    assert first.layers == (tuple(range(7)), tuple(range(14, 21)))
    assert last.layers == (tuple(range(7, 14)), tuple(range(21, 28)))
    assert (first.parts, last.parts) == (("embedding", "vision tower"), ("final norm", "output layer"))
    # By hand: a layer's matrices over 4 ranks with 152064 / 4 vocabulary rows, its norms and the tower whole.
    layer = (3584 * 3584 * 2 + 2 * 512 * 3584 + 3 * 3584 * 18944 + 3584 + 2 * 512) // 4 + 2 * 3584
    vision = 676_550_144  # as its blocks, merger and patch embedding add up
    assert first.num_parameters == 14 * layer + 152064 // 4 * 3584 + vision
    assert last.num_parameters == 14 * layer + 152064 // 4 * 3584 + 3584
    assert first.bytes.weights == 2 * first.num_parameters
    assert first.bytes.optimizer == 6 * first.num_parameters


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2_5_vl_3b", parallel(8, 4, 3)),  # 2 key/value heads on 8 ranks, tied
        ("qwen2_5_vl_3b", parallel(1, 2)),
        ("qwen2_5_vl_7b", parallel(2, 7, 2, context_parallel_size=2)),
        ("qwen2_5_vl_32b", parallel(8, 4, data_parallel_size=2)),
        ("qwen2_5_vl_72b", parallel(8, 4, 2, data_parallel_size=8)),
        ("qwen2_5_vl_72b", parallel(16, 2)),  # more ranks than key/value heads
    ],
)
def test_every_rank_of_large_layouts(name: str, layout: ParallelConfig) -> None:
    with config_dir(name) as path:
        report = inspect_layout(ModelConfig(path=str(path), dtype="bfloat16"), layout)
    coverage, tensor = report.coverage, layout.tensor_model_parallel_size
    assert coverage is not None
    assert coverage.problems == ()
    held = sum(kind.num_parameters for kind in report.kinds)
    assert held == TOTALS[name][0] + (tensor - 1) * coverage.replicated + coverage.copied + coverage.padding


def test_shards_add_up_to_the_model_with_its_replicas_copies_and_padding(small: Path) -> None:
    report = inspect_layout(ModelConfig(path=str(small)), parallel(4, 2, 2))
    coverage = report.coverage
    assert coverage is not None
    assert coverage.problems == ()
    assert coverage.copied == 250 * 64
    assert coverage.padding == 2 * 6 * 64  # 250 -> 256 rows, in the embedding and in its copy
    held = sum(kind.num_parameters for kind in report.kinds)
    assert held == report.num_parameters + 3 * coverage.replicated + coverage.copied + coverage.padding
    assert report.kinds[-1].parts == ("final norm", "copy of the embedding")


def test_ranks_that_differ_in_data_or_context_index_hold_the_same(small: Path) -> None:
    layout = parallel(2, 2, data_parallel_size=2, context_parallel_size=2)
    shapes = hf_shapes(small)
    shards = [build_rank(ModelConfig(path=str(small)), layout, rank, shapes) for rank in range(16)]
    # Rank order: tensor, context, data, pipeline.
    for rank in range(16):
        assert shards[rank] == shards[rank // 8 * 8 + rank % 2]
    assert shards[0] != shards[1] != shards[8]


def test_names_and_shapes_are_those_of_transformers(small: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(small))
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    originals = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): shape
        for name, shape in stored.items()
    }
    assert hf_shapes(small) == originals


@pytest.mark.parametrize(
    ("model", "words", "numbers", "nearest"),
    [
        ("qwen2_5_vl_7b", "--tensor 8 --data 4", "=8 .*num_attention_heads=28", "--tensor 4 --pipeline 1 --data 8"),
        ("qwen2_5_vl_72b", "--tensor 8 --pipeline 3", "=3 .*num_hidden_layers=80", "--tensor 8 --pipeline 4 --data 1"),
        (
            "qwen2_5_vl_7b",
            "--pipeline 4 --virtual-pipeline 2",
            "=2 .* the 7 layers",
            "--tensor 1 --pipeline 2 --virtual-pipeline 2 --data 2",
        ),
    ],
)
def test_impossible_layouts_are_refused_with_the_nearest(model: str, words: str, numbers: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){numbers}.*nearest layouts that work:\n.*{nearest} \("):
        doctor("--model", model, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model qwen2_5_vl_8b", "qwen2_5_vl_8b is neither one of .*'qwen2_5_vl_7b'"),
        ("--model qwen2_5_vl_7b --engine-tensor 8", r"rollout.tensor_parallel_size=8 .*use one of \[1, 2, 4\]$"),
        ("--model qwen2_5_vl_7b --tensor 2 --ranks 0,2", "--ranks 0,2: give all, or numbers from 0 to 1"),
        ("--model qwen2_5_vl_7b --virtual-pipeline 2", "needs parallel.pipeline_model_parallel_size >= 2, got 1"),
        ("--model qwen2_5_vl_7b --freeze vison", r"model.freeze\[0\]='vison': must be one of vision, merger"),
    ],
)
def test_what_cannot_be_used_is_a_configuration_error(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor(*words.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_type: llama\n", "model.yaml is of model_type 'llama'; supported: .*qwen2_5_vl"),
        ("- 1\n", "model.yaml is of model_type None"),
        ("a: [1\n", "model.yaml cannot be read"),
    ],
)
def test_a_file_that_is_no_supported_model_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        doctor("--model", str(tmp_path / "model.yaml"))


def test_nearest_layouts_are_as_many_ranks_where_possible_and_do_work() -> None:
    wanted = parallel(7, 5, data_parallel_size=4)
    found = nearest_layouts(hf_config(), wanted, count=5)
    assert len(found) == 5
    assert found[0] == parallel(4, 7, data_parallel_size=5)
    assert found[0].world_size == wanted.world_size
    assert nearest_layouts(hf_config(), found[0])[0] == found[0]


def test_the_command_reports_some_ranks_and_writes_json(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "layout.json"
    words = f"--model {small} --tensor 2 --data 2 --ranks 3,1 --freeze vision --dtype float32 --json {out}"
    assert doctor(*words.split()) == 0
    text = capsys.readouterr().out
    assert "4 ranks = tensor 2 x pipeline 1 (x 1 chunks) x context 1 x data 2" in text
    assert "Coverage was not checked: it needs all ranks." in text
    (kind,) = json.loads(out.read_text())["kinds"]
    assert kind["ranks"] == [1, 3]
    frozen = sum(
        torch.Size(shape).numel()
        for name, shape in hf_shapes(small).items()
        if name.startswith("visual.") and "merger" not in name
    )
    assert kind["num_trained"] == kind["num_parameters"] - frozen
    assert kind["bytes"]["gradients"] == 4 * kind["num_trained"]


def test_shards_that_do_not_make_up_the_model_are_named_and_exit_with_1(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    split = GateUp.split
    monkeypatch.setattr(GateUp, "split", lambda rule, full, rank, size: split(rule, full, size - 1 - rank, size))
    config = (small / "config.json").read_text()
    (small / "config.json").write_text(config.replace('"intermediate_size": 96', '"intermediate_size": 112'))
    assert doctor("--model", str(small), "--tensor", "2") == 1
    text = capsys.readouterr().out
    assert "do NOT make up the model" in text
    assert "model.layers.0.mlp.gate_proj.weight: tensor rank 0 holds what comes after the part of tensor rank 1" in text


def test_dropping_a_stage_is_found_at_full_size() -> None:
    layout = parallel(2, 2)
    with config_dir("qwen2_5_vl_7b") as path:
        shapes = hf_shapes(path)
        ranks = [build_rank(ModelConfig(path=str(path)), layout, rank, shapes) for rank in range(2)]
    problems = check_coverage(shapes, ranks).problems
    assert "model.layers.14: no rank holds any of its 12 tensors" in problems
    assert "lm_head.weight: no rank holds it" in problems
