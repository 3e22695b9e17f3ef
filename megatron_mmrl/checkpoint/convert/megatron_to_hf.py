"""A Megatron distributed checkpoint, saved in whatever layout, to Hugging Face's safetensors."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron_mmrl.checkpoint.convert.hf_to_megatron import Result
from megatron_mmrl.checkpoint.convert.staging import check_target, new_directory, writing
from megatron_mmrl.checkpoint.convert.stream import Buffer, Progress, blocks, check_finite, one_ahead
from megatron_mmrl.checkpoint.convert.verify import compare
from megatron_mmrl.checkpoint.tensors import encode_header, write_data
from megatron_mmrl.config.checks import require
from megatron_mmrl.models.hf_io import HFReader, NameScheme, safetensors_file, side_files, to_scheme, write_index
from megatron_mmrl.models.megatron_io import MegatronReader, StoredView, files_dir
from megatron_mmrl.models.registry import stored_model


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    scheme: NameScheme | None,
    max_file_bytes: int,
    files_from: Path | None,
    verify: bool,
    progress: Progress,
) -> Result:
    """Convert; ``target`` exists only when everything is in it.

    Args:
        scheme: None: that of the checkpoint from which ``source`` was made, else the original one.
        max_file_bytes: a file holds no more, except for a single larger tensor.
        files_from: Hugging Face directory with configuration and tokenizer; None: those stored in ``source``.

    Raises:
        ValueError: a tensor is missing, of another shape or not finite; a file is cut off; ``target`` exists or its
            disk has no room; with ``verify``, what was written differs.
    """
    check_target(target)
    files = files_from or files_dir(source)
    require((files / "config.json").is_file(), f"{files} has no config.json; name a directory with --files-from")
    model = stored_model(files)
    reader = MegatronReader(source, model)
    scheme = scheme or (reader.origin.scheme if reader.origin else "original")
    groups = group_by_size({name: reader[name].nbytes for name in reader.names}, max_file_bytes)
    num_bytes = sum(reader[name].nbytes for name in reader.names)
    started = time.monotonic()
    with new_directory(target, num_bytes) as draft:
        with writing("configuration and tokenizer", draft):
            for file in side_files(files):
                shutil.copyfile(file, draft / file.name)
        for number, names in enumerate(groups):
            _write_file(draft / safetensors_file(number, len(groups)), names, reader, scheme, progress)
        if len(groups) > 1:
            with writing("index", draft):
                write_index(draft, _weight_map(groups, scheme), num_bytes)
        comparison = compare(reader, HFReader(draft), progress) if verify else None
    seconds = time.monotonic() - started
    return Result(num_tensors=len(reader.names), num_bytes=num_bytes, seconds=seconds, comparison=comparison)


def group_by_size(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most ``max_bytes``; a larger one is alone."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_file(
    file: Path, names: Sequence[str], reader: MegatronReader, scheme: NameScheme, progress: Progress
) -> None:
    views = {name: reader[name] for name in names}
    header = encode_header(((to_scheme(name, scheme), v.dtype, v.shape) for name, v in views.items()), {"format": "pt"})
    with writing("header", file):
        file.write_bytes(header)
    with file.open("ab") as stream:
        for name, block in one_ahead(_blocks(views, reader)):
            with writing(f"tensor {name}", file):
                write_data(stream, block)
                stream.flush()
            progress(name, block.nbytes)


def _blocks(views: dict[str, StoredView], reader: MegatronReader) -> Iterator[tuple[str, Tensor]]:
    """All numbers in order, read when they are asked for; their memory is used again for the next block but one."""
    buffers = itertools.cycle((Buffer(), Buffer()))
    for name, view in views.items():
        for rows in blocks(view.shape, view.nbytes):
            block = next(buffers).take((rows.stop - rows.start, *view.shape[1:]), view.dtype)
            view.read_into(block, rows)
            check_finite(block, reader, name)
            yield name, block


def _weight_map(groups: Sequence[Sequence[str]], scheme: NameScheme) -> dict[str, str]:
    files = [safetensors_file(number, len(groups)) for number in range(len(groups))]
    return {to_scheme(name, scheme): file for file, names in zip(files, groups, strict=True) for name in names}
