"""Slices of a tensor in a file are the slices of the tensor, and cost the bytes of the slice."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_mmrl.models.file_tensor import FileTensor, open_safetensors

SHAPES = ((), (5,), (4, 6), (3, 4, 5), (2, 3, 2, 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, ...], tuple[torch.Tensor, Path]]:
    found = {}
    for shape in SHAPES:
        tensor = torch.randn(shape).bfloat16()
        file = tmp_path_factory.mktemp("tensor") / "raw"
        file.write_bytes(b"head" + tensor.reshape(-1).view(torch.uint8).numpy().tobytes() + b"tail")
        found[shape] = (tensor, file)
    return found


@given(st.sampled_from(SHAPES), st.data())
def test_slices_are_the_tensors_own(files: dict, shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor, file = files[shape]
    stored = FileTensor(io.FileIO(file), 4, torch.bfloat16, shape)
    limits = [
        sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        for size in shape[: data.draw(st.integers(0, 4))]
    ]
    key = tuple(slice(*limit) for limit in limits)
    assert torch.equal(stored[key or slice(None)], tensor[key])


def test_only_the_slice_is_read(files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = files[4, 6]
    stored, read, real = FileTensor(io.FileIO(file), 4, torch.bfloat16, (4, 6)), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(real(*args)) or read[-1])
    stored[1:3, 2:5]
    assert read == [6, 6]  # two rows of three numbers
    read.clear()
    stored[1:3]
    assert read == [24]


def test_a_file_that_ends_early_is_refused_by_name(files: dict) -> None:
    _, file = files[4, 6]
    with pytest.raises(ValueError, match=r"raw ends after 56 bytes, but 48 bytes are expected from 10 on"):
        FileTensor(io.FileIO(file), 10, torch.bfloat16, (4, 6))[:]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "needs 8 bytes, its place 0 to 4 has 4"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "the file is cut off"),
        (b'{"a": {"dtype": "F8", "shape": [8], "data_offsets": [0, 8]}}', "has dtype F8"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "data_offsets"),
        (b"[1, 2]", "list"),
        (b"{", "Expecting"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=rf"bad\.safetensors cannot be read as safetensors: .*{reason}"):
        open_safetensors(file)


def test_an_absurd_header_length_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes((1 << 62).to_bytes(8, "little"))
    with pytest.raises(ValueError, match=r"its header would have 4611686018427387904 bytes"):
        open_safetensors(file)


def test_every_dtype_of_the_format_is_read(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(4).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    }
    save_file(tensors, tmp_path / "all.safetensors")
    read = open_safetensors(tmp_path / "all.safetensors")
    assert {name: (t.dtype, t[:].tolist()) for name, t in read.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }
