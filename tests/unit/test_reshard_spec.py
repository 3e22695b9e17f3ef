"""What an engine rank is told: complete, every place used once, refused when it is not what was written."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.plan import Planner
from megatron_mmrl.reshard.spec import (
    AttachSpec,
    ChecksumRequest,
    RankMemory,
    arena_layout,
    attach_spec,
    contiguous_stride,
)
from tests.unit.reshard_case import CONFIG, planner_for

HANDLES = ({"kind": "memfd", "pid": 1}, {"kind": "memfd", "pid": 2})


def spec_of(planner: Planner, device: int) -> tuple[AttachSpec, dict[int, int], int]:
    """With the trainer's shards in block 0, 1 MiB each, and the arena in block 1."""
    rank, moves = planner.runs[device], planner.incoming(device)
    arena, nbytes = arena_layout(planner, rank, moves, item_bytes=2)
    memory = RankMemory(
        handles=HANDLES,
        held={number: (0, number << 20) for number in range(len(planner.trainer.held))},
        arena={entry: (1, offset) for entry, offset in arena.items()},
    )
    return attach_spec(planner, rank, moves, memory, dtype="bfloat16", answer_dir="/answers"), arena, nbytes


def test_every_parameter_is_told_once_with_the_form_the_engine_has() -> None:
    planner = planner_for(CONFIG, ParallelLayout(tensor=2), tensor=2)
    for device in range(2):
        spec, arena, nbytes = spec_of(planner, device)
        assert (spec.rank, spec.size, spec.blocks) == (planner.runs[device], 2, HANDLES)
        assert [parameter.name for parameter in spec.parameters] == [entry.name for entry in planner.engine.table]
        placements = planner.fragments.placements(spec.rank)
        assert [parameter.shape for parameter in spec.parameters] == [placement.shape for placement in placements]
        assert {parameter.dtype for parameter in spec.parameters} == {"bfloat16"}
        spans = sorted((offset, offset + placements[entry].size * 2) for entry, offset in arena.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= nbytes


def test_what_is_shared_points_at_the_trainer_and_all_else_at_the_arena() -> None:
    planner = planner_for(CONFIG, ParallelLayout(tensor=2), tensor=2)
    spec, arena, _ = spec_of(planner, 0)
    aliases = {move.fragment.entry: move.fragment.held for move in planner.incoming(0) if move.kind == "alias"}
    assert aliases
    assert arena
    assert aliases.keys() | arena.keys() == set(range(len(planner.engine.table)))
    assert not aliases.keys() & arena.keys()
    for number, parameter in enumerate(spec.parameters):
        expected = (0, aliases[number] << 20) if number in aliases else (1, arena[number])
        assert (parameter.block, parameter.offset) == expected


def test_a_parameter_of_nothing_but_padding_has_memory() -> None:
    """10 words, padded to 64 x 4 ranks' share of 16: ranks 1 to 3 hold none of them, and no move fills theirs."""
    planner = planner_for(CONFIG | {"vocab_size": 10}, ParallelLayout(tensor=4), tensor=4)
    for device in range(4):
        spec, _, _ = spec_of(planner, device)
        assert "lm_head.weight" in {parameter.name for parameter in spec.parameters}
        assert len(spec.parameters) == len(planner.engine.table)


def test_messages_come_back_as_they_were() -> None:
    spec, _, _ = spec_of(planner_for(CONFIG, ParallelLayout(), tensor=1), 0)
    assert AttachSpec.from_json(spec.to_json()) == spec
    for request in (ChecksumRequest(answer_dir="/a"), ChecksumRequest(answer_dir="/a", names=("x", "y"))):
        assert ChecksumRequest.from_json(request.to_json()) == request


def test_digests_differ_with_any_content() -> None:
    spec, _, _ = spec_of(planner_for(CONFIG, ParallelLayout(), tensor=1), 0)
    moved = dataclasses.replace(spec.parameters[3], offset=spec.parameters[3].offset + 2)
    others = (
        dataclasses.replace(spec, rank=1),
        dataclasses.replace(spec, answer_dir="/elsewhere"),
        dataclasses.replace(spec, parameters=(*spec.parameters[:3], moved, *spec.parameters[4:])),
    )
    assert len({spec.digest, *(other.digest for other in others)}) == 4


def test_messages_that_were_changed_or_are_of_another_version_are_refused() -> None:
    spec, _, _ = spec_of(planner_for(CONFIG, ParallelLayout(), tensor=1), 0)
    message = json.loads(spec.to_json())
    message["content"]["parameters"][0]["offset"] += 2
    with pytest.raises(ValueError, match="does not have the digest"):
        AttachSpec.from_json(json.dumps(message))
    with pytest.raises(ValueError, match=r"has format 99, this side reads 1: trainer and engine differ in version"):
        AttachSpec.from_json(json.dumps({**message, "format": 99}))
    for text in ("[]", "{}", "not JSON"):
        with pytest.raises(ValueError, match=r"not a message of ours|Expecting value"):
            AttachSpec.from_json(text)


def test_strides_of_contiguous_tensors() -> None:
    assert contiguous_stride((4, 3, 2)) == (6, 2, 1)
    assert contiguous_stride((7,)) == (1,)
