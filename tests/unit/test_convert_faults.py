"""What is wrong with a checkpoint or a disk is named, and nothing is left of the output."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mmrl.checkpoint.convert.hf_to_megatron import hf_to_megatron
from megatron_mmrl.checkpoint.convert.megatron_to_hf import megatron_to_hf
from megatron_mmrl.checkpoint.convert.stream import Progress
from megatron_mmrl.commands.convert import tool
from tests.unit.convert_case import make_source, nothing, read_files, write_files

QKV = "decoder.layers.self_attention.linear_qkv.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("faults") / "source", dtypes="float32")


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    hf_to_megatron(hf, hf.parent / "megatron", verify=False, progress=nothing)
    return hf.parent / "megatron"


@pytest.fixture
def source(hf: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(hf, tmp_path / "in" / "source")


@pytest.fixture
def stored(megatron: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(megatron, tmp_path / "in" / "megatron")


def refused(capsys: pytest.CaptureFixture[str], direction: str, source: Path, out: Path, *options: str) -> str:
    """Run the tool, which must fail and leave ``out``'s directory as it was; returns what it said."""
    out.parent.mkdir(exist_ok=True)
    before = sorted(out.parent.iterdir())
    assert tool(direction, "", [str(source), str(out), *options]) == 1
    assert sorted(out.parent.iterdir()) == before
    return capsys.readouterr().err


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name)


def with_value(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors.get(name, torch.ones(4)))})


def one(bad: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[-1, -1] = bad
        return tensor

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without(UP), rf"source lacks tensor {UP}, which its config\.json asks for"),
        (with_value("model.layers.2.x", lambda t: t), r"source has tensor model\.layers\.2\.x, which its config\.json"),
        (with_value(UP, lambda t: t[:-1]), rf"{UP} in .*model-00001-of-00002.* has shape \(95, 64\).* \(96, 64\)"),
        (with_value(UP, one(float("nan"))), rf"{UP} in .*model-00001-of-00002\.safetensors holds NaN or infinite"),
        (with_value(UP, one(float("-inf"))), rf"{UP} in .*model-00001-of-00002\.safetensors holds NaN or infinite"),
    ],
    ids=["missing", "extra", "misshapen", "nan", "inf"],
)
def test_a_bad_tensor_is_named(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, torch.Tensor]], None],
    said: str,
) -> None:
    tensors = read_files(source)
    spoil(tensors)
    write_files(source, tensors)
    message = refused(capsys, "hf-to-megatron", source, tmp_path / "out" / "m")
    assert re.search(said, message), message


def test_a_tied_checkpoint_whose_two_embeddings_differ_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path / "source", tied=True, dtypes="float32")
    write_files(source, read_files(source) | {"lm_head.weight": torch.ones(320, 64)})
    message = refused(capsys, "hf-to-megatron", source, tmp_path / "out" / "m")
    assert "ties lm_head.weight to model.embed_tokens.weight, but they differ" in message


def test_a_cut_file_is_named(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = source / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    message = refused(capsys, "hf-to-megatron", source, tmp_path / "out" / "m")
    assert "model-00002-of-00002.safetensors cannot be read as safetensors" in message
    assert "the file is cut off" in message


def test_a_file_that_shrinks_while_it_is_read_is_named(source: Path, tmp_path: Path) -> None:
    file = source / "model-00002-of-00002.safetensors"
    (tmp_path / "out").mkdir()

    def shrink(what: str, num_bytes: int) -> None:
        os.truncate(file, 2000)

    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors ends after"):
        hf_to_megatron(source, tmp_path / "out" / "m", verify=False, progress=shrink)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_an_existing_output_is_left_alone(
    direction: str, hf: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "m"
    out.mkdir(parents=True)
    (out / "mine").write_text("precious")
    source = hf if direction == "hf-to-megatron" else megatron
    assert f"{out} exists; name a new directory" in refused(capsys, direction, source, out)
    assert (out / "mine").read_text() == "precious"


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_too_little_room_is_seen_before_anything_is_written(
    direction: str,
    hf: Path,
    megatron: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70_000_000))
    source = hf if direction == "hf-to-megatron" else megatron
    need = sum(t.nbytes for t in read_files(hf).values()) + (64 << 20)
    assert need < 70_000_000  # so it passes ...
    assert tool(direction, "", [str(source), str(tmp_path / "m")]) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    message = refused(capsys, direction, source, tmp_path / "out" / "m")  # ... and with a byte less it does not
    assert f"needs {need:,} bytes, but {tmp_path / 'out'} has {need - 1:,} free" in message


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up_names_tensor_and_file(
    direction: str, hf: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit of a file's size stands for the end of the disk: the write fails in the middle of a tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = refused(capsys, direction, hf if direction == "hf-to-megatron" else megatron, tmp_path / "out" / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "tensor " in message
    assert "cannot be written to" in message
    assert "File too large" in message


@pytest.mark.parametrize(
    ("number", "ending"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["term", "int"]
)
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_signal_leaves_nothing(
    direction: str, number: int, ending: type[BaseException], hf: Path, megatron: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "out").mkdir()
    seen = []

    def interrupt(what: str, num_bytes: int) -> None:
        seen.append(list((tmp_path / "out").iterdir()))
        os.kill(os.getpid(), number)

    with pytest.raises(ending):
        convert(direction, hf, megatron, tmp_path / "out" / "m", interrupt)
    assert len(seen[0]) == 1  # it was there
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def convert(direction: str, hf: Path, megatron: Path, out: Path, progress: Progress, *, verify: bool = False) -> None:
    if direction == "hf-to-megatron":
        hf_to_megatron(hf, out, verify=verify, progress=progress)
    else:
        options = {"scheme": None, "max_file_bytes": 1 << 30, "files_from": None}
        megatron_to_hf(megatron, out, **options, verify=verify, progress=progress)


def edit_metadata(stored: Path, edit: Callable[[object], None]) -> None:
    file = stored / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def _drop_tensor(metadata) -> None:
    del metadata.state_dict_metadata[QKV]


def _drop_chunk(metadata) -> None:
    metadata.state_dict_metadata[QKV].chunks.pop(3)


def _drop_layer(metadata) -> None:
    entry = metadata.state_dict_metadata[QKV]
    entry.size = torch.Size((1, *entry.size[1:]))


def _swap_places(metadata) -> None:
    up, down = (
        next(i for i in metadata.storage_data if i.fqn == f"decoder.layers.mlp.{n}.weight")
        for n in ("linear_fc1", "linear_fc2")
    )
    metadata.storage_data[up] = metadata.storage_data[down]


def _outside(metadata) -> None:
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index].relative_path = "../../secret"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_drop_tensor, f"has no tensor {QKV}"),
        (_drop_chunk, f"chunks of {QKV} hold 0 of the 1024 numbers in [(0, 1), (48, 64), (0, 64)]"),
        (_drop_layer, f"tensor {QKV} in "),
        (_swap_places, "tensor decoder.layers.mlp.linear_fc1.weight, chunk at [0, 0, 0] in "),
        (_outside, "it names the file ../../secret"),
    ],
    ids=["missing", "chunk missing", "misshapen", "another's place", "file elsewhere"],
)
def test_a_megatron_checkpoint_that_is_not_whole_is_refused(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[object], None], said: str
) -> None:
    edit_metadata(stored, edit)
    message = refused(capsys, "megatron-to-hf", stored, tmp_path / "out" / "h")
    assert said in message


def test_nan_in_a_megatron_checkpoint_is_named(stored: Path, hf: Path, tmp_path: Path, capsys) -> None:
    file = stored / "release" / "__0_0.distcp"
    content = file.read_bytes()
    row = read_files(hf)[UP][0].numpy().tobytes()
    assert content.count(row) == 1
    file.write_bytes(content.replace(row, b"\xff" * len(row)))  # NaN in float32
    message = refused(capsys, "megatron-to-hf", stored, tmp_path / "out" / "h")
    assert f"tensor {UP} in {file} holds NaN or infinite numbers" in message


@pytest.mark.parametrize("cut", ["short", "gone"])
def test_a_cut_or_missing_megatron_file_is_named(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: str
) -> None:
    file = stored / "release" / "__0_0.distcp"
    if cut == "gone":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    message = refused(capsys, "megatron-to-hf", stored, tmp_path / "out" / "h")
    assert str(file) in message
    assert ("is missing" if cut == "gone" else "the file is cut off") in message


class _Evil:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self):
        return (os.mkdir, (str(self.touched),))


def test_metadata_that_would_run_code_is_refused(stored: Path, tmp_path: Path, capsys) -> None:
    (stored / "release" / ".metadata").write_bytes(pickle.dumps(_Evil(tmp_path / "touched")))
    message = refused(capsys, "megatron-to-hf", stored, tmp_path / "out" / "h")
    assert "posix.mkdir, which has no place in a checkpoint's metadata" in message
    assert not (tmp_path / "touched").exists()


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path, hf: Path, capsys) -> None:
    assert "is no Megatron distributed checkpoint" in refused(capsys, "megatron-to-hf", hf, tmp_path / "out" / "h")
    (tmp_path / "empty").mkdir()
    for direction, said in (("hf-to-megatron", "a Hugging Face checkpoint"), ("megatron-to-hf", "--files-from")):
        message = refused(capsys, direction, tmp_path / "empty", tmp_path / "out" / "h")
        assert "has no config.json" in message
        assert said in message


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_verify_sees_a_changed_number(direction: str, hf: Path, megatron: Path, tmp_path: Path) -> None:
    """A byte of the written file is changed before it is read back."""
    (tmp_path / "out").mkdir()
    changed = []

    def spoil(what: str, num_bytes: int) -> None:
        if not what.startswith("verify") or changed:
            return
        draft = next((tmp_path / "out").iterdir())
        file = next(draft.rglob("*.distcp" if direction == "hf-to-megatron" else "*.safetensors"))
        content = file.read_bytes()
        row = read_files(hf)[UP][0].numpy().tobytes()
        changed.append(content.count(row))
        with file.open("r+b") as stream:
            stream.seek(content.index(row))
            stream.write(row[4:8])  # the second number over the first

    before = read_files(hf)[UP][0]
    expected = abs(float(before[0].double() - before[1].double()))
    with pytest.raises(ValueError, match=rf"1 tensors differ, such as {UP}; the largest difference is {expected:g} in"):
        convert(direction, hf, megatron, tmp_path / "out" / "m", spoil, verify=True)
    assert changed == [1]
    assert list((tmp_path / "out").iterdir()) == []
