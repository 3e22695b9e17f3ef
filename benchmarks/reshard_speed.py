"""Hand-overs of real layers on a CPU: our plan, a plain copy of the bytes it moves, and gather + load by names.

Eight trainer ranks (processes over gloo) hold decoder layers of a published model in bfloat16; the engines' parameters
lie in each rank's arena. In every round, one after the other:

- ``copy``: each rank copies, out of the same peers' memory, as many bytes as its plan does, each peer's in one piece
  (``memmove`` of the C library);
- ``plan``: ``reshard.execute``;
- ``names``: every rank puts each full tensor together out of all ranks' mapped memory, which is as fast as a gather can
  be here, and copies its engine rank's part of it. An engine behind HTTP would have it serialized and sent, too.

Once, with 32B: ``gloo``, the same with the gather that there is (``reshard.reference``: all_gather over loopback).
A time is from one barrier of all ranks to the next. What each way made is compared.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.reshard_bytes import CONFIGS
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.parallel.geometry import Rect, as_matrix, shard_placement
from megatron_mmrl.parallel.layout import Coordinates
from megatron_mmrl.parallel.sharding import Replicated
from megatron_mmrl.reshard.memory import open_block, typed

if TYPE_CHECKING:
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.reshard.session import WeightSession

MODELS = ("32b", "72b")
WITH_GLOO = ("32b",)  # eight ranks that gather the largest tensor of 72B need more than 20 GB
LAYOUTS = ((8, 1, 8), (8, 1, 4), (8, 1, 2), (4, 2, 8))  # trainer TP, PP; engine TP
RANKS = 8
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians of one pair of layouts."""

    model: str
    tensor: int
    pipeline: int
    engine_tensor: int
    moved_bytes: int
    """That the plan copies, over all ranks."""
    copy_s: float
    plan_s: float
    names_s: float
    gloo_s: float | None

    @property
    def label(self) -> str:
        pipeline = f" x PP {self.pipeline}" if self.pipeline > 1 else ""
        return f"{self.model} TP {self.tensor}{pipeline} -> {self.engine_tensor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """What one rank measured."""

    moved_bytes: int
    seconds: Mapping[str, float]  # medians
    sums: Mapping[str, list[int]]  # of every parameter, by the way in which it was made


def measure(models: Sequence[str], rounds: int) -> list[Speed]:
    """Measure and print every pair of layouts of ``models``."""
    print(
        f"{'hand-over':>22} {'moved':>8} {'copy':>8} {'plan':>8} {'names':>8} {'gloo':>7} | {'plan / copy':>11} "
        f"{'names / plan':>13} {'gloo / plan':>12}"
    )
    rows = []
    for model in models:
        for layout in LAYOUTS:
            row = _measure(model, *layout, rounds)
            print(_line(row), flush=True)
            rows.append(row)
    return rows


def _line(row: Speed) -> str:
    ratio = f"{row.plan_s / row.copy_s:.2f}" if row.moved_bytes else "-"
    gloo, faster = (f"{row.gloo_s:.1f} s", f"{row.gloo_s / row.plan_s:.0f}x") if row.gloo_s else ("-", "-")
    return (
        f"{row.label:>22} {row.moved_bytes / 1e9:>5.2f} GB {row.copy_s:>6.3f} s {row.plan_s:>6.3f} s "
        f"{row.names_s:>6.2f} s {gloo:>7} | {ratio:>11} {row.names_s / row.plan_s:>12.1f}x {faster:>12}"
    )


def _measure(model: str, tensor: int, pipeline: int, engine: int, rounds: int) -> Speed:
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        _write_layers(Path(directory), model, pipeline)
        overrides = [
            f"model.path={directory}",
            "model.dtype=bfloat16",
            f"parallel.tensor_model_parallel_size={tensor}",
            f"parallel.pipeline_model_parallel_size={pipeline}",
            f"rollout.tensor_parallel_size={engine}",
            f"rollout.num_engines={RANKS // engine}",
        ]
        config, port = load_config(QUICKSTART, overrides), probe.getsockname()[1]
        probe.close()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_mmrl.trainer.policy", "megatron_mmrl.reshard.session"])
        with ProcessPoolExecutor(RANKS, context) as pool:
            ranks = [
                pool.submit(_run_rank, rank, config, rounds, port, with_gloo=model in WITH_GLOO)
                for rank in range(RANKS)
            ]
            results = [rank.result() for rank in ranks]
    seconds = results[0].seconds
    for rank, result in enumerate(results):
        if len({tuple(sums) for sums in result.sums.values()}) > 1:
            raise AssertionError(f"{model} TP {tensor} PP {pipeline} -> {engine}: the ways differ on rank {rank}")
    return Speed(
        model=model,
        tensor=tensor,
        pipeline=pipeline,
        engine_tensor=engine,
        moved_bytes=sum(result.moved_bytes for result in results),
        copy_s=seconds["copy"],
        plan_s=seconds["plan"],
        names_s=seconds["names"],
        gloo_s=seconds.get("gloo"),
    )


def _write_layers(directory: Path, model: str, count: int) -> None:
    """A config.json with ``count`` decoder layers of the model, and next to nothing else."""
    config: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"qwen2_5_vl_{model}.yaml"))
    config["text_config"] |= {"num_hidden_layers": count, "vocab_size": 64 * RANKS}
    config["text_config"] |= {"bos_token_id": None, "eos_token_id": None}  # beyond this vocabulary
    small = {"depth": 1, "hidden_size": 128, "intermediate_size": 128, "num_heads": 8, "fullatt_block_indexes": [0]}
    config["vision_config"] |= small
    (directory / "config.json").write_text(json.dumps(config))


def _run_rank(rank: int, config: Config, rounds: int, port: int, *, with_gloo: bool) -> RankResult:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    torch.set_num_threads(1)
    from megatron_mmrl.models.registry import build_model
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown
    from megatron_mmrl.reshard.between import planner_of
    from megatron_mmrl.reshard.memory import share_parameters
    from megatron_mmrl.reshard.reference import export_hf
    from megatron_mmrl.reshard.session import WeightSession
    from megatron_mmrl.trainer.optim import wrap_data_parallel

    initialize(config.parallel, seed=0)
    exchange = Collectives()
    modules = build_model(config.model.path, parallel=config.parallel, model=config.model)
    for module in modules:
        module.requires_grad_(requires_grad=False)  # no gradients are kept: the layers are large
    chunks = wrap_data_parallel(modules, config.parallel)
    session = WeightSession(config, planner_of(config), chunks, share_parameters(chunks), exchange)
    memory = MappedMemory(session, rank)
    engine = EngineMemory(session, rank)
    pieces = list(memory.plain_copies())
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: [ctypes.memmove(*piece) for piece in pieces],
        "plan": lambda: session.executor.run(everything=True),
        "names": lambda: engine.load(memory.full_tensors()),
        "gloo": lambda: engine.load(export_hf(modules)),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    sums: dict[str, list[int]] = {}
    for number in range(-1, rounds):  # the first one touches all memory and is not counted
        for name, run in work.items():
            if name == "gloo" and not (with_gloo and number == 0):
                continue
            took = _timed(run, exchange)
            if number >= 0:
                seconds[name].append(took)
            if number <= 0 and name != "copy":
                sums[name] = engine.sums()
    shutdown()
    return RankResult(
        moved_bytes=sum(nbytes for _, _, nbytes in pieces),
        seconds={name: statistics.median(values) for name, values in seconds.items()},
        sums=sums,
    )


def _timed(run: Callable[[], Any], exchange: Collectives) -> float:
    exchange.barrier()
    start = time.perf_counter()
    run()
    exchange.barrier()
    return time.perf_counter() - start


class MappedMemory:
    """All ranks' weights, as this rank has mapped them."""

    def __init__(self, session: WeightSession, rank: int) -> None:
        self._session, self._rank = session, rank
        self._blocks: dict[tuple[int, int], Tensor] = {}

    def plain_copies(self) -> Iterator[tuple[int, int, int]]:
        """(target address, source address, bytes): what the plan takes from each peer, as one piece of its memory."""
        wanted: dict[int, int] = defaultdict(int)
        for move in self._session.planner.incoming(self._rank):
            if move.kind != "alias":
                wanted[move.peer] += move.fragment.source.size * torch.bfloat16.itemsize
        target = self._session.blocks[-1].tensor.data_ptr()
        for peer, nbytes in wanted.items():
            block = self._block(peer, 0)
            while nbytes > 0:
                part = min(nbytes, block.numel())
                yield target, block.data_ptr(), part
                target, nbytes = target + part, nbytes - part

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model under its Hugging Face name, one after the other."""
        planner = self._session.planner
        layout, shapes = planner.trainer.layout, planner.fragments.shapes
        for number, held in enumerate(planner.trainer.held):
            full = tuple(shapes[name] for name in held.entry.hf_names)
            ranks = 1 if isinstance(held.entry.rule, Replicated) else layout.tensor
            shards = []
            for tensor in range(ranks):
                peer = layout.rank(Coordinates(tensor=tensor, context=0, data=0, pipeline=held.stage))
                placement = shard_placement(held.entry.rule, full, tensor, layout.tensor)
                block, offset = self._session.memories[peer].held[number]
                matrix = typed(self._block(peer, block), offset, as_matrix(placement.shape), torch.bfloat16)
                shards.append((matrix, placement.pieces))
            for index, name in enumerate(held.entry.hf_names):
                result = torch.empty(as_matrix(full[index]), dtype=torch.bfloat16)
                for matrix, pieces in shards:
                    for piece in pieces:
                        if piece.tensor == index:
                            result[_slices(piece.of)] = matrix[_slices(piece.at)]
                yield name, result
                del result

    def _block(self, rank: int, number: int) -> Tensor:
        if (rank, number) not in self._blocks:
            own = rank == self._rank
            self._blocks[rank, number] = (
                self._session.blocks[number].tensor if own else open_block(self._session.memories[rank].handles[number])
            )
        return self._blocks[rank, number]


class EngineMemory:
    """The parameters of the engine rank on this rank's device."""

    def __init__(self, session: WeightSession, rank: int) -> None:
        self._targets: dict[str, list[tuple[Tensor, Rect]]] = defaultdict(list)  # by name: place, and part of the full
        self._arena: list[Tensor] = []
        planner = session.planner
        for index, placement in enumerate(planner.fragments.placements(planner.runs[rank])):
            if index in session.memories[rank].arena:
                block, offset = session.memories[rank].arena[index]
                target = typed(session.blocks[block].tensor, offset, as_matrix(placement.shape), torch.bfloat16)
                self._arena.append(target)
            else:  # shared with the trainer by our plan; loading by names needs memory for it
                target = torch.empty(as_matrix(placement.shape), dtype=torch.bfloat16)
            names = planner.engine.table[index].hf_names
            for piece in placement.pieces:
                self._targets[names[piece.tensor]].append((target[_slices(piece.at)], piece.of))

    def load(self, full: Iterable[tuple[str, Tensor]]) -> None:
        """Take each parameter's part of the full tensors."""
        for name, tensor in full:
            matrix = tensor.reshape(as_matrix(tuple(tensor.shape)))
            for target, part in self._targets[name]:
                target.copy_(matrix[_slices(part)])
            del tensor, matrix  # before the next one is made

    def sums(self) -> list[int]:
        """A sum of each parameter in the arena."""
        return [_sum(tensor) for tensor in self._arena]


def _sum(tensor: Tensor) -> int:
    """In pieces: torch widens all that it sums."""
    return sum(int(part.sum(dtype=torch.int64)) for part in tensor.view(torch.int16).flatten().split(1 << 20))


def _slices(rect: Rect) -> tuple[slice, slice]:
    return slice(rect.top, rect.bottom), slice(rect.left, rect.right)
