"""Hugging Face -> Megatron -> Hugging Face gives back every byte: tensors in name and dtype, and all other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_mmrl.checkpoint.convert import hf_to_megatron as to_megatron
from megatron_mmrl.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megatron_mmrl.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megatron_mmrl.models.dist_metadata import read_metadata
from megatron_mmrl.models.hf_io import to_original, to_scheme
from tests.unit.convert_case import make_source, nothing, read_files


def back(source: Path, target: Path, scheme: str | None = None, max_file_bytes: int = 1 << 30) -> None:
    megatron_to_hf(
        source, target, scheme=scheme, max_file_bytes=max_file_bytes, files_from=None, verify=True, progress=nothing
    )


@pytest.mark.parametrize(
    ("scheme", "tied", "dtypes"),
    [("original", False, "mixed"), ("transformers", False, "float32"), ("original", True, "mixed")],
)
def test_every_byte_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, tied: bool, dtypes: str
) -> None:
    source = make_source(tmp_path / "source", scheme=scheme, tied=tied, dtypes=dtypes)
    monkeypatch.setattr(to_megatron, "MAX_FILE_BYTES", 100_000)  # several files
    result = hf_to_megatron(source, tmp_path / "megatron", verify=True, progress=nothing)
    assert result.comparison is not None
    assert result.comparison.largest_difference == 0
    assert len(list((tmp_path / "megatron" / "release").glob("*.distcp"))) > 2
    back(tmp_path / "megatron", tmp_path / "back", max_file_bytes=200_000)
    before, after = read_files(source), read_files(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert tensor.contiguous().view(torch.uint8).equal(after[name].view(torch.uint8)), name
    weights = ("model", "model.safetensors.index.json")
    for directory, other in ((source, tmp_path / "back"), (tmp_path / "back", source)):
        for file in directory.iterdir():
            assert file.name.startswith(weights) or file.read_bytes() == (other / file.name).read_bytes()
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert (tmp_path / "back" / "generation_config.json").exists()
    assert (tmp_path / "back" / "chat_template.jinja").exists()


def test_the_other_names_come_out_when_asked_for(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    hf_to_megatron(source, tmp_path / "megatron", verify=False, progress=nothing)
    back(tmp_path / "megatron", tmp_path / "back", scheme="transformers")
    names = read_files(tmp_path / "back").keys()
    assert names == {to_scheme(to_original(name), "transformers") for name in read_files(source)}
    assert any(name.startswith("model.visual.") for name in names)


def test_stored_names_shapes_and_order_are_megatrons(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", dtypes="float32")
    hf_to_megatron(source, tmp_path / "megatron", verify=False, progress=nothing)
    tensors = read_metadata(tmp_path / "megatron" / "release")
    rows = 320  # vocabulary of the tiny tokenizer
    assert {key: tensor.shape for key, tensor in tensors.items() if not key.startswith("visual.")} == {
        "embedding.word_embeddings.weight": (rows, 64),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 64),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 128, 64),
        "decoder.layers.self_attention.linear_qkv.bias": (2, 128),
        "decoder.layers.self_attention.linear_proj.weight": (2, 64, 64),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 64),
        "decoder.layers.mlp.linear_fc1.weight": (2, 192, 64),
        "decoder.layers.mlp.linear_fc2.weight": (2, 64, 96),
        "decoder.final_layernorm.weight": (64,),
        "output_layer.weight": (rows, 64),
    }
    # By torch's own reader, a row of each fused tensor: heads of 16 rows, two query heads, a key and a value per group.
    import torch.distributed.checkpoint as dcp

    keys = ("decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight")
    read = {key: torch.empty(tensors[key].shape) for key in keys}
    dcp.load(read, checkpoint_id=tmp_path / "megatron" / "release", no_dist=True)
    hf = read_files(source)
    layer = "model.layers.1."
    qkv, fc1 = (read[key][1] for key in keys)
    assert qkv[64 + 5].equal(hf[layer + "self_attn.q_proj.weight"][32 + 5])
    assert qkv[64 + 32 + 5].equal(hf[layer + "self_attn.k_proj.weight"][16 + 5])
    assert qkv[64 + 48 + 5].equal(hf[layer + "self_attn.v_proj.weight"][16 + 5])
    assert fc1[7].equal(hf[layer + "mlp.gate_proj.weight"][7])
    assert fc1[96 + 7].equal(hf[layer + "mlp.up_proj.weight"][7])
