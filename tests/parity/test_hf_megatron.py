"""Megatron's model equals Hugging Face's in every layout: logits, loss, gradients and their norm, weights both ways."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase, digits

import numpy as np
import pytest
import torch

from megatron_mmrl.compat import declare_torchvision_ops
from tests.dist.launch import run_ranks
from tests.parity.layout_case import (
    MODELS,
    Compared,
    Reference,
    bfloat16_differences,
    compare,
    hugging_face_logits,
    make_reference,
)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_reference(name, tmp_path_factory.mktemp(name)) for name in MODELS}


SIZES = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "dp": "parallel.data_parallel_size",
}
FLAGS = {
    "nosp": "parallel.sequence_parallel=false",
    "padded": "trainer.packing=false",
    "full": "model.recompute=full",
    "selective": "model.recompute=selective",
    "overlap": "parallel.overlap_grad_reduce=true",
    "plain": "parallel.use_distributed_optimizer=false",
}
# Model, sizes and flags. Without a flag: sequence parallelism, packed, no recomputation, distributed optimizer.
QUICK = (
    "untied",
    "odd padded full",
    "tied tp2 padded nosp",
    "untied tp2 selective",
    "tied tp4 full",
    "tied pp2 padded",
    "untied pp2 vpp2 full",
    "odd cp2 selective",
    "tied cp2 padded",
    "untied dp2 cp2 overlap",
    "tied tp2 cp2",
    "tied pp2 vpp2 cp2",
)
LONG = (
    "tied",
    "untied padded selective",
    "untied tp4 nosp",
    "untied tp4 padded full",
    "tied tp8",
    "tied tp8 padded nosp selective",
    "odd tp3 cp2",
    "untied pp4",
    "tied pp4 cp2 full",
    "tied pp2 tp2 dp2",
    "untied pp2 vpp2 tp2 cp2 selective",
    "tied pp2 vpp2 tp2 dp2 overlap",
    "tied pp2 vpp2 padded",
    "untied pp4 tp2 padded",
    "untied cp4",
    "odd cp4 padded full",
    "tied cp4 tp2",
    "untied cp4 tp2 padded nosp",
    "tied cp4 pp2",
    "tied tp4 cp2 selective",
    "tied tp4 pp2 full",
    "untied tp2 pp2 cp2",
    "tied tp2 cp2 dp2 overlap",
    "untied pp2 cp2 dp2 padded",
    "odd dp2 plain",
    "untied tp2 dp2 padded plain",
    "tied cp2 dp2 padded plain",
)


def parse(layout: str) -> tuple[str, int, tuple[str, ...]]:
    """Model, ranks and overrides of a row of the table."""
    model, *words = layout.split()
    sizes = {word.rstrip(digits): int(word.lstrip(ascii_lowercase)) for word in words if word[-1] in digits}
    ranks = int(np.prod([size for name, size in sizes.items() if name != "vpp"]))
    overrides = [f"{SIZES[name]}={size}" for name, size in sizes.items()]
    overrides += [FLAGS[word] for word in words if word[-1] not in digits]
    if "vpp" in sizes:  # four micro-batches: with two, nothing travels both ways at once
        overrides.append("trainer.micro_batch_sequences=1")
    return model, ranks, tuple(overrides)


@pytest.mark.parametrize("layout", [*QUICK, *(pytest.param(layout, marks=pytest.mark.full) for layout in LONG)])
def test_a_layout_equals_hugging_face(references: dict[str, Path], layout: str) -> None:
    model, ranks, overrides = parse(layout)
    reference: Reference = torch.load(references[model], weights_only=False)  # written by the fixture
    results: list[Compared] = run_ranks(compare, ranks, references[model], overrides)
    for found in results:
        assert found.weights_differ == []
        assert found.loss == pytest.approx(reference.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)
        assert {name: error for name, error in found.gradient_errors.items() if not error <= 1e-4} == {}
    errors = [found.logit_error for found in results if found.logit_error is not None]
    assert len(errors) == ranks // _stages(layout)
    assert max(errors) <= 1e-5


def _stages(layout: str) -> int:
    return int(next((word.removeprefix("pp") for word in layout.split() if word.startswith("pp")), "1"))


@pytest.mark.parametrize("layout", ["untied", "tied tp2", "odd cp2 padded"])
def test_bfloat16_is_as_far_from_float32_as_hugging_face_s(references: dict[str, Path], layout: str) -> None:
    """In the mean over all logits; the largest is one token's luck (0.8 to 1.4 of Hugging Face's was seen)."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, ranks, overrides = parse(layout)
    reference: Reference = torch.load(references[model], weights_only=False)  # written by the fixture
    oracle = Qwen2_5_VLForConditionalGeneration.from_pretrained(reference.path, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = torch.cat(
            [
                (hugging_face_logits(oracle, sequence).float() - logits).abs()
                for sequence, logits in zip(reference.sequences, reference.logits, strict=True)
            ]
        )
    sums, counts, largest = zip(*run_ranks(bfloat16_differences, ranks, references[model], overrides), strict=True)
    assert sum(counts) % theirs.numel() == 0
    assert sum(sums) / sum(counts) <= 1.1 * theirs.mean().item()
    assert max(largest) <= 2 * theirs.max().item()


def test_the_table_is_what_it_should_be() -> None:
    """At least 24 layouts, every size and flag among them, none twice."""
    table = (*QUICK, *LONG)
    assert len(set(table)) == len(table) >= 24
    words = {word for layout in table for word in layout.split()}
    assert words >= {"tp2", "tp4", "tp8", "pp2", "pp4", "vpp2", "cp2", "cp4", "dp2", *FLAGS, *MODELS}
    assert all(parse(layout)[1] <= 4 for layout in QUICK)


def test_positions_equal_hugging_face() -> None:
    """Also with an image at the very beginning and one at the very end; gaps are tokens of text."""
    declare_torchvision_ops()
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    from megatron_mmrl.models.qwen2_5_vl.mrope import position_ids

    with torch.device("meta"):
        small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
        oracle = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=small, vision_config={"depth": 1}))
    pad = 7
    cases = (([[1, 4, 6], [1, 2, 2]], (0, 3, 0)), ([[1, 6, 4]], (5, 2)), ([[1, 2, 8], [1, 8, 2]], (1, 1, 9)))
    for grids, gaps in cases:
        grid = np.array(grids)
        parts = [np.zeros(gaps[0], dtype=np.int64)]
        for g, gap in zip(grid, gaps[1:], strict=True):
            parts += [np.full(g.prod() // 4, pad), np.zeros(gap, dtype=np.int64)]
        ids = np.concatenate(parts)
        expected, _ = oracle.get_rope_index(
            torch.from_numpy(ids)[None], torch.from_numpy(ids == pad).int()[None], torch.from_numpy(grid)
        )
        np.testing.assert_array_equal(position_ids(ids, grid, image_token_id=pad, merge_size=2), expected[:, 0])
