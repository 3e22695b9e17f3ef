"""A Megatron distributed checkpoint, seen as the Hugging Face checkpoint with the same weights.

Nothing is converted until it is sliced, and then only the slice: what loads from Hugging Face's files in any layout
loads from Megatron's in the same way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.models.dist_metadata import RELEASE, TRACKER_FILE
from megatron_mmrl.models.dist_reader import DistReader, GlobalTensorReader
from megatron_mmrl.models.file_tensor import DTYPE_OF_CODE, bounds
from megatron_mmrl.models.hf_io import ORIGIN_FILE, NameScheme
from megatron_mmrl.models.stored import Run, StoredModel, StoredPart, row_runs, stored_shape
from megatron_mmrl.parallel.sharding import Vocab

_FORMAT = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_OF_CODE.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a Megatron checkpoint cannot say of the Hugging Face checkpoint that it was made from."""

    scheme: NameScheme
    dtypes: Mapping[str, str]
    """Of every tensor, by original name: a global tensor has one dtype, that of its widest part."""

    def write(self, directory: Path) -> None:
        text = json.dumps({"format": _FORMAT} | asdict(self), indent=1)
        (directory / ORIGIN_FILE).write_text(text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Origin | None:
        """None: the checkpoint was not made from one of Hugging Face. Raises ValueError: not readable."""
        file = directory / ORIGIN_FILE
        if not file.is_file():
            return None
        content = json.loads(file.read_text())
        require(content.get("format") == _FORMAT, f"{file} has format {content.get('format')}, known is {_FORMAT}")
        unknown = sorted(set(content["dtypes"].values()) - _DTYPES.keys())
        require(not unknown, f"{file} names the dtypes {unknown}; known: {sorted(_DTYPES)}")
        return cls(scheme=content["scheme"], dtypes=content["dtypes"])


class MegatronReader:
    """The tensors by their original Hugging Face names; same use as ``HFReader``.

    Args:
        path: a checkpoint, or a directory of Megatron-LM with a tracker file.
        model: what the checkpoint should hold.

    Raises:
        ValueError: no such checkpoint, or a tensor is missing or has another shape than the model.
    """

    def __init__(self, path: Path, model: StoredModel) -> None:
        self._reader = DistReader(path)
        self.path = self._reader.path
        self.origin = Origin.read(files_dir(path))
        # What was trained since has dtypes of its own.
        self._dtypes = self.origin.dtypes if self.origin and self.path.name == RELEASE else {}
        self._model = model
        self._parts = {name: (part, i) for part in model.parts for i, name in enumerate(part.entry.hf_names)}
        stored_twice = self.origin.dtypes.keys() & model.copies.keys() if self.origin else set()
        self._parts |= {copy: self._parts[model.copies[copy]] for copy in stored_twice}

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def __getitem__(self, name: str) -> StoredView:
        require(name in self._parts, f"{self.path} has no tensor {name}; it holds {len(self._parts)} others")
        part, index = self._parts[name]
        tensor, layer = self._global(part)
        rows = row_runs(part.entry.rule, stored_shape(part, self._model.shapes)[0])[index]
        shape = self._model.shapes[self._model.copies.get(name, name)]
        dtype = _DTYPES[self._dtypes[name]] if name in self._dtypes else tensor.dtype
        return StoredView(tensor, layer, rows, shape, dtype)

    def _global(self, part: StoredPart) -> tuple[GlobalTensorReader, int | None]:
        """The tensor that holds ``part``, and the index of its layer there."""
        wanted = stored_shape(part, self._model.shapes)
        single = None if part.layer is None else part.key.replace(".layers.", f".layers.{part.layer}.", 1)
        tensor, layer = (
            (self._reader[single], None)  # layers that Megatron did not stack
            if single is not None and single in self._reader
            else (self._reader[part.key], part.layer)
        )
        found = tensor.shape if layer is None else tensor.shape[1:]
        rows_fit = found[0] == wanted[0] or (isinstance(part.entry.rule, Vocab) and found[0] > wanted[0])
        require(
            rows_fit and found[1:] == wanted[1:] and (layer is None or layer < tensor.shape[0]),
            f"tensor {tensor.key} in {self.path} has shape {tensor.shape}, but {', '.join(part.entry.hf_names)} of "
            f"config.json make {wanted}{'' if layer is None else f' for each of {self._model.num_layers} layers'}",
        )
        return tensor, layer

    def file_of(self, name: str) -> Path:
        """A file that holds a tensor of ``names``."""
        tensor, layer = self._global(self._parts[name][0])
        return tensor.files(layer)[0]


class StoredView:
    """A Hugging Face tensor whose rows lie somewhere in a global tensor."""

    def __init__(
        self,
        tensor: GlobalTensorReader,
        layer: int | None,
        runs: Sequence[Run],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._tensor, self._layer, self._runs = tensor, layer, runs

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, key: slice | tuple[slice, ...]) -> Tensor:
        result = torch.empty([end - first for first, end in bounds(self.shape, key)], dtype=self.dtype)
        self.read_into(result, key)
        return result

    def read_into(self, target: Tensor, key: slice | tuple[slice, ...]) -> None:
        """Fill ``target``, which has the shape of the slice and this tensor's dtype, and is contiguous."""
        if target.dtype != self._tensor.dtype:
            target.copy_(StoredView(self._tensor, self._layer, self._runs, self.shape, self._tensor.dtype)[key])
            return
        (first, end), *rest = bounds(self.shape, key)
        for run in self._runs:
            begin, stop = max(first, run.first), min(end, run.end)
            if begin < stop:
                shift = run.stored_first - run.first
                box = [(begin + shift, stop + shift), *rest]
                self._tensor.read_into(target[begin - first : stop - first], self._layer, box)


def files_dir(path: Path) -> Path:
    """Where the configuration and tokenizer files of a Megatron checkpoint are: beside the tracker file, if any."""
    beside = (path, path.parent)
    return next((place for place in beside if (place / TRACKER_FILE).is_file()), path)
