"""A stand-in for the trainer, in the test's own process: it owns an engine's weights and changes them in place."""

from __future__ import annotations

import base64
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_mmrl.parallel.geometry import as_matrix
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.attach import Answer, read_answers
from megatron_mmrl.reshard.between import planner_between
from megatron_mmrl.reshard.checksum import as_number, checksum
from megatron_mmrl.reshard.memory import SharedBlock, typed
from megatron_mmrl.reshard.places import packed
from megatron_mmrl.reshard.spec import AttachSpec, ChecksumRequest, RankMemory, arena_layout, attach_spec
from megatron_mmrl.rollout.server_args import ATTACH_LOADER, CHECKSUM_LOADER
from megatron_mmrl.rollout.sglang_client import SGLangEngine
from tests.parity.engine_case import Case, Weights
from tests.unit.reshard_case import cut

CPU = torch.device("cpu")


class Owner:
    """All trainer ranks' memory: their shards, and an arena each for what the engine does not share with them."""

    def __init__(self, case: Case, *, tensor: int, whole_encoder: bool = False) -> None:
        self.planner = planner_between(
            case.path,
            ParallelLayout(tensor=tensor),
            tensor=tensor,
            engines=1,
            whole_encoder=whole_encoder,
            ranks_per_node=tensor,
        )
        self.blocks: list[tuple[SharedBlock, SharedBlock]] = []
        self.memories: list[RankMemory] = []
        for device in range(tensor):
            sizes = [shard.nbytes for shard in self._shards(case.weights(), device)]
            offsets, nbytes = packed(sizes)
            moves = self.planner.incoming(device)
            arena, arena_bytes = arena_layout(self.planner, self.planner.runs[device], moves, item_bytes=4)
            self.blocks.append((SharedBlock(nbytes, CPU), SharedBlock(arena_bytes, CPU)))
            self.memories.append(
                RankMemory(
                    handles=tuple(block.handle for block in self.blocks[-1]),
                    held={number: (0, offset) for number, offset in enumerate(offsets)},
                    arena={entry: (1, offset) for entry, offset in arena.items()},
                )
            )

    def load(self, weights: Weights) -> None:
        """What a training step and the hand-over after it do, without a word to the engine."""
        for device in range(len(self.blocks)):
            for number, shard in enumerate(self._shards(weights, device)):
                self._held(device, number, tuple(shard.shape)).copy_(shard)
        for device in range(len(self.blocks)):
            for move in self.planner.incoming(device):
                if move.kind != "alias":
                    shape = self.planner.fragments.shard(move.fragment).shape
                    source = self._held(move.peer, move.fragment.held, as_matrix(shape))
                    target = self._parameter(device, move.fragment.entry)
                    cut(target, move.fragment.target).copy_(cut(source, move.fragment.source))

    def specs(self, answer_dir: Path) -> list[AttachSpec]:
        """In the order of the engine's ranks."""
        by_rank = {rank: device for device, rank in self.planner.runs.items()}
        return [
            attach_spec(
                self.planner,
                rank,
                self.planner.incoming(by_rank[rank]),
                self.memories[by_rank[rank]],
                dtype="float32",
                answer_dir=str(answer_dir),
            )
            for rank in sorted(by_rank)
        ]

    def checksums(self, answer_dir: Path) -> list[dict[str, int]]:
        """Of what the specs point at, in the order of the engine's ranks."""
        return [
            {
                parameter.name: as_number(
                    checksum(
                        typed(
                            self.blocks[device][parameter.block].tensor,
                            parameter.offset,
                            parameter.shape,
                            torch.float32,
                        )
                    )
                )
                for parameter in spec.parameters
            }
            for spec, device in zip(self.specs(answer_dir), self.planner.devices[0], strict=True)
        ]

    def _shards(self, weights: Weights, rank: int) -> list[torch.Tensor]:
        size = self.planner.trainer.layout.tensor
        return [
            held.entry.rule.split([weights[name] for name in held.entry.hf_names], rank, size)
            for held in self.planner.trainer.held
        ]

    def _held(self, device: int, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        block, offset = self.memories[device].held[number]
        return typed(self.blocks[device][block].tensor, offset, shape, torch.float32)

    def _parameter(self, device: int, entry: int) -> torch.Tensor:
        block, offset = self.memories[device].arena[entry]
        shape = self.planner.fragments.placements(self.planner.runs[device])[entry].shape
        return typed(self.blocks[device][block].tensor, offset, as_matrix(shape), torch.float32)


def post(engine: SGLangEngine, loader: str, messages: Sequence[str]) -> None:
    """Call a loader in every rank of the engine; SGLang's own answer says only that it was called."""
    payloads = [
        pickle.dumps([("spec", torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))]) for text in messages
    ]
    body = {
        "serialized_named_tensors": [base64.b64encode(payload).decode() for payload in payloads],
        "load_format": loader,
        "flush_cache": False,
    }
    engine._expect_success("calling", engine._admin("calling", "/update_weights_from_tensor", body))


def attach(engine: SGLangEngine, specs: Sequence[AttachSpec]) -> list[Answer]:
    post(engine, ATTACH_LOADER, [spec.to_json() for spec in specs])
    return read_answers(Path(specs[0].answer_dir), len(specs))


def engine_checksums(engine: SGLangEngine, answer_dir: Path, *, size: int, names: tuple[str, ...] | None = None):
    request = ChecksumRequest(answer_dir=str(answer_dir), names=names)
    post(engine, CHECKSUM_LOADER, [request.to_json()] * size)
    return [answer.checksums for answer in read_answers(answer_dir, size)]


def changed(spec: AttachSpec, name: str, **fields: object) -> AttachSpec:
    """The spec with other fields for the parameter ``name``."""
    return with_parameters(
        spec,
        lambda parameters: [dataclasses.replace(item, **fields) if item.name == name else item for item in parameters],
    )


def with_parameters(spec: AttachSpec, change: Callable) -> AttachSpec:
    return dataclasses.replace(spec, parameters=tuple(change(spec.parameters)))
