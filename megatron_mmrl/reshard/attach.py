"""What runs inside SGLang's processes: its parameters become the trainer's memory.

SGLang calls ``attach`` and ``checksums`` (its ``custom_weight_loader``) in every tensor-parallel rank, between two
batches. An exception that left them would end the engine, so none does: all is checked before anything is touched, and
what came of it is written as a file for each rank into the directory that the message names. Only when every rank has
found its part exactly as planned does any take it; otherwise the engine goes on with the weights it had.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.reshard.checksum import as_number, checksum
from megatron_mmrl.reshard.memory import open_block, typed
from megatron_mmrl.reshard.spec import AttachSpec, ChecksumRequest, ParameterSpec

Finding = tuple[str, tuple[str, ...]]
"""Where a rank was told to answer, and what it found wrong."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the tensor-parallel ranks of its engine."""

    rank: int
    size: int
    all_gather: Callable[[Finding], list[Finding]]  # of all ranks, in rank order


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an engine rank has to say."""

    rank: int
    digest: str = ""  # of the spec that was attached
    problems: tuple[str, ...] = ()  # of any rank; where there is one, no parameter of any rank has changed
    checksums: Mapping[str, int] | None = None  # by parameter


def attach(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """SGLang's loader: rebind every parameter of ``model`` as the ``AttachSpec`` in the message says, or none."""
    _contained(lambda: attach_weights(model, named_tensors, _sglang_ranks()))


def checksums(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """SGLang's loader: answer the ``ChecksumRequest`` in the message."""
    _contained(lambda: sum_weights(model, named_tensors, _sglang_ranks().rank))


def attach_weights(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]], ranks: Ranks) -> None:
    """Map the trainer's memory; if every rank found it as planned, put it in the place of the parameters; answer."""
    parameters = dict(model.named_parameters())
    answer_dir, digest, tensors, problems = "", "", {}, []
    try:
        spec = AttachSpec.from_json(_text(named_tensors))
        answer_dir, digest = spec.answer_dir, spec.digest
        problems = list(_differences(parameters, spec, ranks))
        tensors = {} if problems else _mapped(spec)
        problems += _other_devices(parameters, tensors)
    except Exception as error:  # noqa: BLE001  # the other ranks wait for this one's finding
        problems.append(f"rank {ranks.rank}: {type(error).__name__}: {error}")
    findings = ranks.all_gather((answer_dir, tuple(problems)))
    found = [problem for _, theirs in findings for problem in theirs]
    if not found and len({place for place, _ in findings}) > 1:
        found = [f"the ranks were told to answer in different places: {[place for place, _ in findings]}"]
    if not found:
        for name, tensor in tensors.items():
            parameters[name].data = tensor
    if answer_dir:
        _write(answer_dir, Answer(rank=ranks.rank, digest="" if found else digest, problems=tuple(found)))


@torch.no_grad()
def sum_weights(model: torch.nn.Module, named_tensors: Sequence[tuple[str, Tensor]], rank: int) -> None:
    """Answer with the checksums of the parameters asked for, as they are in this process's memory."""
    request = ChecksumRequest.from_json(_text(named_tensors))
    parameters = dict(model.named_parameters())
    names = tuple(parameters) if request.names is None else request.names
    unknown = tuple(f"rank {rank}: {name} is no parameter of the engine" for name in names if name not in parameters)
    if unknown or not names:
        _write(request.answer_dir, Answer(rank=rank, problems=unknown, checksums={}))
        return
    totals = torch.stack([checksum(parameters[name]) for name in names]).tolist()  # one wait for the device
    sums = {name: as_number(total) for name, total in zip(names, totals, strict=True)}
    _write(request.answer_dir, Answer(rank=rank, checksums=sums))


def read_answers(directory: Path, size: int) -> list[Answer]:
    """What the engine's ``size`` ranks wrote, in rank order.

    Raises:
        FileNotFoundError: a rank wrote nothing; the engine's log says why.
    """
    answers = [json.loads(_path(directory, rank).read_text()) for rank in range(size)]
    return [Answer(**{**answer, "problems": tuple(answer["problems"])}) for answer in answers]


def _differences(parameters: Mapping[str, Tensor], spec: AttachSpec, ranks: Ranks) -> Iterator[str]:
    """What the engine has and what was planned, wherever they are not the same."""
    where = f"rank {ranks.rank}"
    if (spec.rank, spec.size) != (ranks.rank, ranks.size):
        yield f"{where} of {ranks.size} was sent what is for rank {spec.rank} of {spec.size}"
    planned = {parameter.name: parameter for parameter in spec.parameters}
    if len(planned) != len(spec.parameters):
        yield f"{where}: {len(spec.parameters)} parameters were planned under {len(planned)} names"
    yield from (f"{where}: the engine has {name}, which was not planned" for name in parameters.keys() - planned.keys())
    for name, parameter in planned.items():
        if name not in parameters:
            yield f"{where}: {name} was planned, the engine has no such parameter"
        elif (ours := _form(parameter)) != (theirs := _form_of(parameters[name])):
            yield f"{where}: {name} was planned as {ours}, the engine has {theirs}"


def _form(parameter: ParameterSpec) -> str:
    return f"{parameter.dtype} {list(parameter.shape)} with strides {list(parameter.stride)}"


def _form_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {list(tensor.stride())}"


def _mapped(spec: AttachSpec) -> dict[str, Tensor]:
    """The trainer's memory in the form of each parameter. Raises ValueError, OSError or RuntimeError."""
    wanted = {parameter.block for parameter in spec.parameters}
    require(wanted <= set(range(len(spec.blocks))), f"there are {len(spec.blocks)} blocks, wanted are {sorted(wanted)}")
    blocks = {number: open_block(spec.blocks[number]) for number in wanted}
    tensors = {}
    for parameter in spec.parameters:
        tensor = typed(blocks[parameter.block], parameter.offset, parameter.shape, getattr(torch, parameter.dtype))
        require(
            tensor.stride() == parameter.stride,
            f"{parameter.name}: strides {list(parameter.stride)} are planned, but only contiguous memory can be shared",
        )
        tensors[parameter.name] = tensor
    return tensors


def _other_devices(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} is on {parameters[name].device}, the trainer's memory for it on {tensor.device}"
        for name, tensor in tensors.items()
        if tensor.device != parameters[name].device
    ]


def _contained(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:  # noqa: BLE001  # it would end the engine; without an answer the trainer refuses
        _log.exception("the request about shared weights failed")


def _text(named_tensors: Sequence[tuple[str, Tensor]]) -> str:
    ((_, content),) = named_tensors
    return bytes(content.cpu().numpy()).decode()


def _sglang_ranks() -> Ranks:
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()

    def all_gather(finding: Finding) -> list[Finding]:
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, finding, group=group.cpu_group)
        return gathered

    return Ranks(rank=group.rank_in_group, size=group.world_size, all_gather=all_gather)


def _write(directory: str, answer: Answer) -> None:
    path = _path(Path(directory), answer.rank)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(answer)))
    os.replace(draft, path)


def _path(directory: Path, rank: int) -> Path:
    return directory / f"answer{rank}.json"
