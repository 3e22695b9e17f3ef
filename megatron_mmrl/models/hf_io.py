"""Hugging Face checkpoints: read slice by slice, written shard by shard; never a whole model in memory.

Two naming schemes are in use for Qwen2.5-VL: the *original* one of the published files (``visual.*``, ``model.*``,
``lm_head.weight``) and that of transformers' modules (``model.visual.*``, ``model.language_model.*``). In this program
tensors go by their original names; the other scheme exists at this border only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_mmrl import pulse
from megatron_mmrl.config.checks import require
from megatron_mmrl.models.file_tensor import FileTensor, open_safetensors
from megatron_mmrl.parallel.sharding import Sliceable, WeightEntry

NameScheme = Literal["original", "transformers"]
INDEX_FILE = "model.safetensors.index.json"
ORIGIN_FILE = "hf_origin.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"
"""These two make a directory one of Megatron's, see ``megatron_io``."""
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


class StoredTensor(Sliceable, Protocol):
    """A tensor of a checkpoint, read when sliced."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def nbytes(self) -> int: ...

    def read_into(self, target: Tensor, key: slice | tuple[slice, ...]) -> None: ...


class TensorReader(Protocol):
    """The tensors of a checkpoint by their original names: Hugging Face's files, or Megatron's seen like them."""

    @property
    def names(self) -> list[str]: ...

    def __getitem__(self, name: str) -> StoredTensor: ...

    def file_of(self, name: str) -> Path: ...


class HFReader:
    """The tensors of a checkpoint directory by their original names, read slice by slice.

    Raises:
        ValueError: no safetensors in the directory, a file that is not whole, or a tensor that is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[Path, dict[str, FileTensor]] = {}
        self._stored: dict[str, tuple[str, Path]] = {}
        for name, file in self._list_tensors():
            other = self._stored.setdefault(to_original(name), (name, file))
            require(other[0] == name, f"{path} holds {other[0]} and {name}, which are the same tensor; remove one")

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    @property
    def scheme(self) -> NameScheme:
        """How the files name their tensors."""
        renamed = any(name != stored for name, (stored, _) in self._stored.items())
        return "transformers" if renamed else "original"

    def file_of(self, name: str) -> Path:
        """The file that holds (or should hold) a tensor of ``names``."""
        return self._stored[name][1]

    def __getitem__(self, name: str) -> FileTensor:
        require(
            name in self._stored,
            f"{self._path} has no tensor {name}; it holds {len(self._stored)} others, such as {self.names[:3]}",
        )
        stored_name, file = self._stored[name]
        tensors = self._open(file)
        require(stored_name in tensors, f"{file} has no tensor {stored_name}, although {INDEX_FILE} says so")
        return tensors[stored_name]

    def _list_tensors(self) -> list[tuple[str, Path]]:
        index = self._path / INDEX_FILE
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
            outside = [file for file in files.values() if Path(file).name != file]
            require(not outside, f"{index} names {outside[:1]}: files must lie beside it")
            return [(name, self._path / file) for name, file in files.items()]
        single = self._path / _SINGLE
        require(
            single.is_file(), f"{self._path} has neither {INDEX_FILE} nor {_SINGLE}; give a Hugging Face checkpoint"
        )
        return [(name, single) for name in self._open(single)]

    def _open(self, file: Path) -> dict[str, FileTensor]:
        if file not in self._files:
            self._files[file] = open_safetensors(file)
        return self._files[file]


@torch.no_grad()
def load_parameters(
    module: nn.Module, table: dict[str, WeightEntry], reader: TensorReader, rank: int, size: int
) -> None:
    """Fill every parameter of ``module`` with its shard; the checkpoint's dtype is converted to the parameter's.

    Args:
        table: one entry per parameter of ``module``.
        rank: tensor-parallel rank of ``size``.

    Raises:
        ValueError: a tensor is missing or has another shape than the model.
    """
    for name, parameter in module.named_parameters():
        pulse.beat()
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


def safetensors_file(number: int, count: int) -> str:
    """Name of file ``number`` (from 0) of ``count``."""
    return _SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(out_dir: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write which file (of several) holds which tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (out_dir / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _name_parts(out_dir: Path, parts: list[list[str]], total_bytes: int) -> None:
    """The number of files is part of their names and known only at the end."""
    if len(parts) == 1:
        _part_file(out_dir, 0).replace(out_dir / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = safetensors_file(number, len(parts))
        _part_file(out_dir, number).replace(out_dir / file)
        weight_map.update(dict.fromkeys(names, file))
    write_index(out_dir, weight_map, total_bytes)


def side_files(source: Path) -> list[Path]:
    """What belongs to a checkpoint besides its weights: configuration, tokenizer, processor and chat template."""
    suffixes = (".json", ".jinja", ".txt", ".model", ".tiktoken")
    other = (INDEX_FILE, ORIGIN_FILE, TRACKER_FILE)
    return [f for f in sorted(source.iterdir()) if f.is_file() and f.suffix in suffixes and f.name not in other]


def _copy_side_files(source: Path, out_dir: Path, dtype: torch.dtype) -> None:
    for file in side_files(source):
        shutil.copyfile(file, out_dir / file.name)
    config = json.loads((source / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
