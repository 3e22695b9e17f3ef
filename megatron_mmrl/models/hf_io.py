"""Hugging Face checkpoints: read slice by slice, written shard by shard; never a whole model in memory.

Two naming schemes are in use for Qwen2.5-VL: the *original* one of the published files (``visual.*``, ``model.*``,
``lm_head.weight``) and that of transformers' modules (``model.visual.*``, ``model.language_model.*``). In this program
tensors go by their original names; the other scheme exists at this border only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.sharding import WeightEntry

NameScheme = Literal["original", "transformers"]
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TO_ORIGINAL = (("model.visual.", "visual."), ("model.language_model.", "model."))
_TO_TRANSFORMERS = (("visual.", "model.visual."), ("model.", "model.language_model."))


def to_original(name: str) -> str:
    """The original name of a tensor named in either scheme."""
    return _rename(name, _TO_ORIGINAL)


def to_scheme(name: str, scheme: NameScheme) -> str:
    """The name that an originally named tensor has in ``scheme``."""
    return name if scheme == "original" else _rename(name, _TO_TRANSFORMERS)


def _rename(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class LazyTensor:
    """A tensor in a file: knows its shape, reads only what is sliced."""

    def __init__(self, file: safe_open, stored_name: str) -> None:
        self._slice = file.get_slice(stored_name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Tensor:
        return self._slice[key]


class HFReader:
    """The tensors of a checkpoint directory by their original names.

    Raises:
        ValueError: no safetensors in the directory, a file that is not whole, or a tensor that is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[Path, safe_open] = {}
        self._stored = {to_original(name): (name, file) for name, file in self._list_tensors()}

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def __getitem__(self, name: str) -> LazyTensor:
        require(
            name in self._stored,
            f"{self._path} has no tensor {name}; it holds {len(self._stored)} others, such as {self.names[:3]}",
        )
        stored_name, file = self._stored[name]
        return LazyTensor(self._open(file), stored_name)

    def _list_tensors(self) -> list[tuple[str, Path]]:
        index = self._path / _INDEX
        if index.is_file():
            return [(name, self._path / file) for name, file in json.loads(index.read_text())["weight_map"].items()]
        single = self._path / _SINGLE
        require(single.is_file(), f"{self._path} has neither {_INDEX} nor {_SINGLE}; give a Hugging Face checkpoint")
        return [(name, single) for name in self._open(single).keys()]  # noqa: SIM118  # not a mapping

    def _open(self, file: Path) -> safe_open:
        if file not in self._files:
            try:
                self._files[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
        return self._files[file]


@torch.no_grad()
def load_parameters(module: nn.Module, table: dict[str, WeightEntry], reader: HFReader, rank: int, size: int) -> None:
    """Fill every parameter of ``module`` with its shard; the checkpoint's dtype is converted to the parameter's.

    Args:
        table: one entry per parameter of ``module``.
        rank: tensor-parallel rank of ``size``.

    Raises:
        ValueError: a tensor is missing or has another shape than the model.
    """
    for name, parameter in module.named_parameters():
        entry = table[name]
        shard = entry.rule.split([reader[hf_name] for hf_name in entry.hf_names], rank, size)
        require(
            shard.shape == parameter.shape,
            f"{', '.join(entry.hf_names)} make a shard of shape {tuple(shard.shape)}, but {name} has shape "
            f"{tuple(parameter.shape)}: checkpoint and config.json do not belong together",
        )
        parameter.copy_(shard)


def write_checkpoint(
    out_dir: Path, tensors: Iterable[tuple[str, Tensor]], *, source: Path, max_file_bytes: int = 4 << 30
) -> None:
    """Write a checkpoint that Hugging Face and SGLang load, holding at most one file's tensors at a time.

    Args:
        out_dir: made if missing; it is a checkpoint only when this returns.
        tensors: names (in the scheme that the files shall have) and full tensors.
        source: directory whose config, tokenizer and processor files are copied; the dtype in the copied
            ``config.json`` becomes that of the tensors.
        max_file_bytes: a file is closed before it would exceed this (a larger tensor gets a file of its own).
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = []
    total_bytes, dtype = 0, torch.float32
    pending: dict[str, Tensor] = {}
    pending_bytes = 0
    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_file_bytes:
            _write_part(out_dir, pending, parts)
            pending, pending_bytes = {}, 0
        # A copy: the exporter may reuse its memory, and file writers refuse views of one buffer.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total_bytes, dtype = total_bytes + tensor.nbytes, tensor.dtype
    _write_part(out_dir, pending, parts)
    _name_parts(out_dir, parts, total_bytes)
    _copy_side_files(source, out_dir, dtype)


def _part_file(out_dir: Path, number: int) -> Path:
    return out_dir / f"part-{number:05d}"


def _write_part(out_dir: Path, tensors: dict[str, Tensor], parts: list[list[str]]) -> None:
    save_file(tensors, _part_file(out_dir, len(parts)), metadata={"format": "pt"})
    parts.append(list(tensors))


def _name_parts(out_dir: Path, parts: list[list[str]], total_bytes: int) -> None:
    """The number of files is part of their names and known only at the end."""
    if len(parts) == 1:
        _part_file(out_dir, 0).replace(out_dir / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        _part_file(out_dir, number).replace(out_dir / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (out_dir / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy_side_files(source: Path, out_dir: Path, dtype: torch.dtype) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != _INDEX:
            shutil.copyfile(file, out_dir / file.name)
    config = json.loads((source / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
