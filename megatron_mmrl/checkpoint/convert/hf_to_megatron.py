"""Hugging Face's safetensors to a Megatron distributed checkpoint that loads in any layout.

The result is a directory that Megatron-LM takes as ``--load``: a tracker file and the checkpoint below ``release/``;
beside the tracker file lie configuration, tokenizer and processor of the source, byte for byte.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_mmrl.checkpoint.convert.dist_writer import DistWriter
from megatron_mmrl.checkpoint.convert.plan import (
    GlobalTensor,
    Part,
    check_names,
    chunk_slices,
    divided_dim,
    global_tensors,
)
from megatron_mmrl.checkpoint.convert.staging import check_target, new_directory, writing
from megatron_mmrl.checkpoint.convert.stream import Buffer, Progress, check_finite, one_ahead
from megatron_mmrl.checkpoint.convert.verify import Comparison, compare
from megatron_mmrl.config.checks import require
from megatron_mmrl.models.dist_metadata import RELEASE, TRACKER_FILE
from megatron_mmrl.models.hf_io import HFReader, side_files
from megatron_mmrl.models.megatron_io import MegatronReader, Origin
from megatron_mmrl.models.registry import stored_model
from megatron_mmrl.models.stored import StoredModel, row_runs

MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a conversion did."""

    num_tensors: int
    """Hugging Face's."""
    num_bytes: int
    """Of the tensors as written."""
    seconds: float
    """To read, write and verify them."""
    comparison: Comparison | None
    """Both sides read back; None: not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """What is written at a time."""

    tensor: GlobalTensor
    part: Part
    box: tuple[slice, ...]
    """Of the part."""
    values: Tensor

    @property
    def start(self) -> tuple[int, ...]:
        layer = self.part.stored.layer
        return (*([] if layer is None else [layer]), *(cut.start for cut in self.box))

    @property
    def what(self) -> str:
        return ", ".join(self.part.stored.entry.hf_names)


def hf_to_megatron(source: Path, target: Path, *, verify: bool, progress: Progress) -> Result:
    """Convert; ``target`` exists only when everything is in it.

    Raises:
        ValueError: a tensor is missing, not expected, of another shape or not finite; a file is cut off; ``target``
            exists or its disk has no room; with ``verify``, what was written differs.
    """
    check_target(target)
    require((source / "config.json").is_file(), f"{source} has no config.json; give a Hugging Face checkpoint")
    model = stored_model(source)
    reader = HFReader(source)
    _check_source(reader, model, source)
    tensors = global_tensors(model, {name: reader[name].dtype for name in model.shapes})
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    started = time.monotonic()
    with new_directory(target, num_bytes) as draft:
        with writing("configuration and tokenizer", draft):
            _write_side(reader, source, draft)
        writer = DistWriter(draft / RELEASE, MAX_FILE_BYTES)
        for chunk in one_ahead(_chunks(tensors, reader)):
            with writing(f"tensor {chunk.what}", draft):
                writer.add_chunk(chunk.tensor.key, chunk.tensor.shape, chunk.start, chunk.values)
            progress(chunk.what, chunk.values.nbytes)
        with writing("metadata", draft):
            for key in model.empty_objects:
                writer.add_empty_object(key)
            writer.finish(model.arguments)
        comparison = compare(reader, MegatronReader(draft, model), progress) if verify else None
    seconds = time.monotonic() - started
    return Result(num_tensors=len(reader.names), num_bytes=num_bytes, seconds=seconds, comparison=comparison)


def _check_source(reader: HFReader, model: StoredModel, source: Path) -> None:
    check_names(reader.names, model, str(source))
    for name in reader.names:
        wanted = model.shapes[model.copies.get(name, name)]
        require(
            reader[name].shape == wanted,
            f"tensor {name} in {reader.file_of(name)} has shape {reader[name].shape}, config.json makes it {wanted}",
        )
    for copy, name in model.copies.items():
        if copy in reader.names:
            _check_copy(reader, copy, name)


def _check_copy(reader: HFReader, copy: str, name: str) -> None:
    rows = 4096
    first, second = reader[copy], reader[name]
    same = first.dtype == second.dtype and all(
        first[row : row + rows].equal(second[row : row + rows]) for row in range(0, first.shape[0], rows)
    )
    require(same, f"{reader.file_of(copy)}: config.json ties {copy} to {name}, but they differ; which one is meant?")


def _write_side(reader: HFReader, source: Path, draft: Path) -> None:
    for file in side_files(source):
        shutil.copyfile(file, draft / file.name)
    dtypes = {name: str(reader[name].dtype).removeprefix("torch.") for name in reader.names}
    Origin(scheme=reader.scheme, dtypes=dtypes).write(draft)
    (draft / TRACKER_FILE).write_text(RELEASE + "\n")
    (draft / RELEASE).mkdir()


def _chunks(tensors: tuple[GlobalTensor, ...], reader: HFReader) -> Iterator[_Chunk]:
    """Each chunk with its numbers, read when it is asked for; its memory is used again for the next but one."""
    whole, buffers = Buffer(), itertools.cycle((Buffer(), Buffer()))
    for tensor in tensors:
        for part in tensor.parts:
            columns = None
            if divided_dim(part.stored.entry.rule) == 1:  # a row at a time would be too many reads
                columns = whole.take(part.shape, tensor.dtype)
                _fill(columns, part, (0, part.shape[0]), reader)
            for box in chunk_slices(part.stored.entry.rule, part.shape):
                values = next(buffers).take([cut.stop - cut.start for cut in box], tensor.dtype)
                if columns is not None:
                    values.copy_(columns[box])
                else:
                    _fill(values, part, (box[0].start, box[0].stop), reader)
                yield _Chunk(tensor=tensor, part=part, box=box, values=values.view(*part.lead, *values.shape))


def _fill(target: Tensor, part: Part, rows: tuple[int, int], reader: HFReader) -> None:
    """Read and check rows (first, end) of a part, from whichever tensors they come."""
    first, end = rows
    entry = part.stored.entry
    for name, runs in zip(entry.hf_names, row_runs(entry.rule, part.shape[0]), strict=True):
        source = reader[name]
        for run in runs:
            begin = max(first, run.stored_first)
            stop = min(end, run.stored_first + run.end - run.first)
            if begin >= stop:
                continue
            piece, shift = target[begin - first : stop - first], run.first - run.stored_first
            if source.dtype == target.dtype:
                source.read_into(piece, slice(begin + shift, stop + shift))
            else:
                piece.copy_(source[begin + shift : stop + shift])
            check_finite(piece, reader, name)
