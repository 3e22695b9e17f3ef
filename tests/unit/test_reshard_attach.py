"""What an engine rank does with a message, without an engine: takes all of it or none, answers, and never raises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_mmrl.reshard import attach
from megatron_mmrl.reshard.attach import Finding, Ranks, attach_weights, read_answers, sum_weights
from megatron_mmrl.reshard.checksum import as_number, checksum
from megatron_mmrl.reshard.memory import SharedBlock
from megatron_mmrl.reshard.spec import AttachSpec, ChecksumRequest, ParameterSpec
from megatron_mmrl.rollout.server_args import ATTACH_LOADER, CHECKSUM_LOADER


def message(spec: AttachSpec | ChecksumRequest) -> list[tuple[str, torch.Tensor]]:
    return [("spec", torch.frombuffer(bytearray(spec.to_json().encode()), dtype=torch.uint8))]


def ranks(*others: Finding) -> Ranks:
    """Rank 0, and what the ranks after it find."""
    return Ranks(rank=0, size=1 + len(others), all_gather=lambda finding: [finding, *others])


@pytest.fixture
def block() -> SharedBlock:
    block = SharedBlock(1024, torch.device("cpu"))
    block.tensor.view(torch.float32).fill_(0.5)
    return block


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(6, 4)


def spec_for(block: SharedBlock, directory: Path, *, size: int = 1) -> AttachSpec:
    forms = {"weight": ((4, 6), (6, 1), 256), "bias": ((4,), (1,), 0)}
    return AttachSpec(
        rank=0,
        size=size,
        answer_dir=str(directory),
        blocks=(block.handle,),
        parameters=tuple(
            ParameterSpec(name=name, shape=shape, stride=stride, dtype="float32", block=0, offset=offset)
            for name, (shape, stride, offset) in forms.items()
        ),
    )


def test_a_spec_that_fits_is_taken(model: torch.nn.Module, block: SharedBlock, tmp_path: Path) -> None:
    spec = spec_for(block, tmp_path)
    attach_weights(model, message(spec), ranks())
    (answer,) = read_answers(tmp_path, 1)
    assert (answer.rank, answer.digest, answer.problems) == (0, spec.digest, ())
    assert bool((model.weight == 0.5).all())
    block.tensor[:16].view(torch.float32).fill_(2.0)
    assert model.bias.tolist() == [2.0] * 4
    assert model.weight.requires_grad  # still the module's own parameter

    request = ChecksumRequest(answer_dir=str(tmp_path))
    sum_weights(model, message(request), 0)
    (answer,) = read_answers(tmp_path, 1)
    assert answer.checksums == {name: as_number(checksum(parameter)) for name, parameter in model.named_parameters()}


def test_what_another_rank_finds_refuses_here_too(model: torch.nn.Module, block: SharedBlock, tmp_path: Path) -> None:
    before = model.weight.data_ptr()
    attach_weights(model, message(spec_for(block, tmp_path, size=2)), ranks((str(tmp_path), ("rank 1: no",))))
    assert read_answers(tmp_path, 1)[0].problems == ("rank 1: no",)
    assert model.weight.data_ptr() == before


def test_ranks_of_different_attachments_refuse(model: torch.nn.Module, block: SharedBlock, tmp_path: Path) -> None:
    before = model.weight.data_ptr()
    attach_weights(model, message(spec_for(block, tmp_path, size=2)), ranks(("/earlier", ())))
    (problem,) = read_answers(tmp_path, 1)[0].problems
    assert "told to answer in different places" in problem
    assert model.weight.data_ptr() == before


def test_a_parameter_that_lies_differently_is_refused(block: SharedBlock, tmp_path: Path) -> None:
    model = torch.nn.Linear(6, 4)
    model.weight.data = torch.zeros(6, 4).t()
    attach_weights(model, message(spec_for(block, tmp_path)), ranks())
    (problem,) = read_answers(tmp_path, 1)[0].problems
    assert problem == (
        "rank 0: weight was planned as float32 [4, 6] with strides [6, 1], "
        "the engine has float32 [4, 6] with strides [1, 4]"
    )


def test_memory_on_another_device_is_refused(block: SharedBlock, tmp_path: Path) -> None:
    model = torch.nn.Linear(6, 4, device="meta")
    attach_weights(model, message(spec_for(block, tmp_path)), ranks())
    assert read_answers(tmp_path, 1)[0].problems[0] == "weight is on meta, the trainer's memory for it on cpu"


def test_two_places_for_one_parameter_are_refused(model: torch.nn.Module, block: SharedBlock, tmp_path: Path) -> None:
    spec = spec_for(block, tmp_path)
    spec = dataclasses.replace(spec, parameters=(*spec.parameters, spec.parameters[0]))
    attach_weights(model, message(spec), ranks())
    assert read_answers(tmp_path, 1)[0].problems == ("rank 0: 3 parameters were planned under 2 names",)


def test_a_rank_that_cannot_read_its_message_still_tells_the_others(model: torch.nn.Module) -> None:
    told: list[Finding] = []

    def all_gather(finding: Finding) -> list[Finding]:
        told.append(finding)
        return [finding, ("/elsewhere", ())]

    for content in ([], [("spec", torch.zeros(4, dtype=torch.uint8))], [("spec", torch.tensor([255]))]):
        attach_weights(model, content, Ranks(rank=0, size=2, all_gather=all_gather))
    assert [place for place, _ in told] == [""] * 3
    assert all(problems for _, problems in told)


def test_an_unknown_name_is_no_checksum(model: torch.nn.Module, tmp_path: Path) -> None:
    sum_weights(model, message(ChecksumRequest(answer_dir=str(tmp_path), names=("weight", "wait"))), 0)
    (answer,) = read_answers(tmp_path, 1)
    assert answer.problems == ("rank 0: wait is no parameter of the engine",)
    assert answer.checksums == {}


def test_the_names_that_sglang_imports_are_these_functions() -> None:
    for path, function in ((ATTACH_LOADER, attach.attach), (CHECKSUM_LOADER, attach.checksums)):
        module, name = path.rsplit(".", 1)
        assert (module, getattr(attach, name)) == (attach.__name__, function)


def test_nothing_leaves_the_loaders(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_group() -> Ranks:
        raise AssertionError("no group")

    monkeypatch.setattr(attach, "_sglang_ranks", no_group)
    attach.attach(model, [])
    attach.checksums(model, [])
    assert caplog.text.count("no group") >= 2
