"""A small checkpoint of every awkward kind, and what is left of a directory after a failure."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_mmrl.models.hf_io import to_original, to_scheme
from megatron_mmrl.models.tiny import TinySizes, make_tiny_checkpoint

SIZES = TinySizes(num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, intermediate=96, vision_intermediate=50)


def nothing(what: str, num_bytes: int) -> None:
    """No progress is shown."""


def make_source(directory: Path, *, scheme: str = "original", tied: bool = False, dtypes: str = "mixed") -> Path:
    """Two files with an index; random biases and norms; ``mixed``: three dtypes, within stacks and fused tensors."""
    make_tiny_checkpoint(directory, tied=tied, sizes=SIZES)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        original = to_original(name)
        value = torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
        tensors[to_scheme(original, scheme)] = value.to(_dtype(original) if dtypes == "mixed" else torch.float32)
    if tied:  # some writers store the second name too
        tensors["lm_head.weight"] = next(t for n, t in tensors.items() if n.endswith("embed_tokens.weight")).clone()
    write_files(directory, tensors)
    return directory


def _dtype(name: str) -> torch.dtype:
    if "norm" in name:
        return torch.float32
    return (
        torch.float16
        if name.endswith(("layers.0.mlp.gate_proj.weight", "layers.1.self_attn.k_proj.bias"))
        else torch.bfloat16
    )


def write_files(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights by two files."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_files(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors by stored name, with the format's own library."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
