"""Checkpoint files: both naming schemes in, several files out, broken ones refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_mmrl.models.hf_io import HFReader, load_parameters, to_original, to_scheme, write_checkpoint
from megatron_mmrl.parallel.sharding import GateUp, Replicated, WeightEntry

NAMES = {  # original -> transformers
    "visual.blocks.0.norm1.weight": "model.visual.blocks.0.norm1.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize("original", NAMES)
def test_names_map_both_ways(original: str) -> None:
    assert to_scheme(original, "transformers") == NAMES[original]
    assert to_original(NAMES[original]) == to_original(original) == to_scheme(original, "original") == original


def test_reader_finds_tensors_of_either_scheme_and_reads_slices(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(4, 3)
    save_file({"model.language_model.norm.weight": weight}, tmp_path / "model.safetensors")
    tensor = HFReader(tmp_path)["model.norm.weight"]
    assert tensor.shape == (4, 3)
    assert torch.equal(tensor[1:3], weight[1:3])
    assert torch.equal(tensor[:, 0:1], weight[:, :1])


def test_a_missing_tensor_names_itself(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.norm\.weight; it holds 1 others, such as \['lm_head"):
        HFReader(tmp_path)["model.norm.weight"]


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"):
        HFReader(tmp_path)


def test_a_cut_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        HFReader(tmp_path)


def source(directory: Path) -> Path:
    directory.mkdir()
    config = {"model_type": "m", "dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "vocab_size": 3}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"old weights")
    return directory


def test_written_files_hold_the_tensors_and_the_side_files(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    out = tmp_path / "out"
    write_checkpoint(out, tensors.items(), source=source(tmp_path / "source"), max_file_bytes=100)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [list(load_file(out / file)) for file in files] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    reader = HFReader(out)
    assert all(torch.equal(reader[name][:], tensor) for name, tensor in tensors.items())
    assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 200}
    assert (out / "tokenizer.json").exists()
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["text_config"]) == ("float32", {"dtype": "float32", "vocab_size": 3})
    assert not list(out.glob("part-*"))


def test_one_file_needs_no_index_and_views_of_one_buffer_are_fine(tmp_path: Path) -> None:
    buffer = torch.arange(8.0)
    out = tmp_path / "out"
    write_checkpoint(out, [("a", buffer[:6].view(2, 3).T), ("b", buffer[4:])], source=source(tmp_path / "source"))
    saved = load_file(out / "model.safetensors")
    assert torch.equal(saved["a"], buffer[:6].view(2, 3).T)
    assert torch.equal(saved["b"], buffer[4:])
    assert not (out / "model.safetensors.index.json").exists()


def test_parameters_get_their_shards_and_other_shapes_are_refused(tmp_path: Path) -> None:
    gate, up = torch.arange(8.0).view(4, 2), torch.arange(8.0, 16).view(4, 2)
    save_file({"gate": gate, "up": up, "norm": torch.ones(3)}, tmp_path / "model.safetensors")
    module = nn.ParameterDict({"fc1": torch.zeros(4, 2, dtype=torch.bfloat16)})
    table = {"fc1": WeightEntry(hf_names=("gate", "up"), rule=GateUp())}
    load_parameters(module, table, HFReader(tmp_path), rank=1, size=2)
    assert module["fc1"].tolist() == [[4, 5], [6, 7], [12, 13], [14, 15]]
    with pytest.raises(ValueError, match=r"norm make a shard of shape \(3,\), but fc1 has shape \(4, 2\)"):
        load_parameters(module, {"fc1": WeightEntry(hf_names=("norm",), rule=Replicated())}, HFReader(tmp_path), 0, 1)
