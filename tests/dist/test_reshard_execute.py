"""A plan carried out by real ranks gives every engine rank, to the bit, what the plain path by names would load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mmrl.config import Config, load_config
from megatron_mmrl.parallel.geometry import as_matrix
from tests.dist.launch import run_ranks
from tests.unit.reshard_case import cut

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BUCKET_BYTES = 20_000  # the largest weight of the model has 131,072 bytes: between nodes it is cut


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pair of layouts."""

    tensor: int = 1
    pipeline: int = 1
    chunks: int | None = None
    context: int = 1
    data: int = 1
    engine: int = 1
    engines: int = 1
    per_node: int | None = None
    tied: bool = False
    bf16: bool = False
    whole_encoder: bool = False
    freeze: str = "[]"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def config(self, models: Path) -> Config:
        return load_config(
            CONFIG,
            [
                f"model.path={models / ('tied' if self.tied else 'untied')}",
                f"model.dtype={'bfloat16' if self.bf16 else 'float32'}",
                f"model.freeze={self.freeze}",
                f"parallel.tensor_model_parallel_size={self.tensor}",
                f"parallel.pipeline_model_parallel_size={self.pipeline}",
                f"parallel.virtual_pipeline_model_parallel_size={self.chunks or 'null'}",
                f"parallel.context_parallel_size={self.context}",
                f"parallel.data_parallel_size={self.data}",
                f"rollout.tensor_parallel_size={self.engine}",
                f"rollout.num_engines={self.engines}",
                f"rollout.mm_enable_dp_encoder={str(self.whole_encoder).lower()}",
                f"reshard.bucket_bytes={BUCKET_BYTES}",
            ],
        )


SHORT = {
    "one rank": Layout(),
    "TP2-2": Layout(tensor=2, engine=2),
    "TP2-1, two engines": Layout(tensor=2, engines=2),
    "TP1-2 on replicas": Layout(data=2, engine=2),
    "PP2-2 tied": Layout(pipeline=2, engine=2, tied=True),
    "PP2 VPP2-1 two engines": Layout(pipeline=2, chunks=2, engines=2),
    "TP2-1 to another node": Layout(tensor=2, engine=1, per_node=1),
    "PP2-1 to another node, bf16": Layout(pipeline=2, engine=1, per_node=1, bf16=True),
    "CP2-2 frozen language": Layout(context=2, engine=2, freeze="[language]"),
    "TP2 PP2-4": Layout(tensor=2, pipeline=2, engine=4),
    "TP4-4 more ranks than groups": Layout(tensor=4, engine=4),
    "TP2 PP2-2 nodes of 2": Layout(tensor=2, pipeline=2, engine=2, engines=2, per_node=2),
}
LONG = {
    "TP4-2": Layout(tensor=4, engine=2, engines=2),
    "TP4-1, four engines": Layout(tensor=4, engines=4),
    "PP4-4 tied": Layout(pipeline=4, engine=4, tied=True),
    "PP4-1 on four nodes": Layout(pipeline=4, engine=1, engines=4, per_node=1),
    "TP2 PP2 VPP2-2 tied, bf16": Layout(tensor=2, pipeline=2, chunks=2, engine=2, tied=True, bf16=True),
    "DP4-4 whole encoder": Layout(data=4, engine=4, whole_encoder=True),
    "TP2 CP2-4 frozen vision": Layout(tensor=2, context=2, engine=4, freeze="[vision]"),
    "TP4-1 on nodes of 2": Layout(tensor=4, engine=1, engines=4, per_node=2),
    "TP2 PP2 DP2-4": Layout(tensor=2, pipeline=2, data=2, engine=4, engines=2),
    "TP2 PP4-2 nodes of 4": Layout(tensor=2, pipeline=4, engine=2, engines=4, per_node=4),
    "TP4 PP2-4 nodes of 4, tied": Layout(tensor=4, pipeline=2, engine=4, engines=2, per_node=4, tied=True),
    "TP2 CP2 DP2-4 whole encoder": Layout(tensor=2, context=2, data=2, engine=4, engines=2, whole_encoder=True),
    "PP2 VPP2 DP4-2, bf16": Layout(pipeline=2, chunks=2, data=4, engine=2, engines=4, bf16=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models whose vision MLP and vocabulary need padding in the engine."""
    from megatron_mmrl.models.tiny import TinySizes, make_tiny_checkpoint

    path = tmp_path_factory.mktemp("models")
    for tied in (False, True):
        sizes = TinySizes(vision_intermediate=60)
        make_tiny_checkpoint(path / ("tied" if tied else "untied"), tied=tied, sizes=sizes)
    return path


def hand_over_twice(config: Config, per_node: int | None) -> dict[str, Any]:
    """On one rank: weights are handed over, all that are trained change, and are handed over again."""
    import os

    from megatron_mmrl.models.hf_io import HFReader
    from megatron_mmrl.models.parts import freeze_parameters
    from megatron_mmrl.models.registry import build_model, load_checkpoint, open_checkpoint
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize, shutdown
    from megatron_mmrl.reshard.memory import share_parameters
    from megatron_mmrl.reshard.between import planner_of
    from megatron_mmrl.reshard.session import WeightSession
    from megatron_mmrl.trainer.optim import wrap_data_parallel

    initialize(config.parallel, seed=0)
    exchange = Collectives()
    if per_node:
        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    planner = planner_of(config)
    modules = build_model(config.model.path, parallel=config.parallel, model=config.model)
    load_checkpoint(modules, open_checkpoint(config.model.path))
    freeze_parameters(modules, config.model.freeze, HFReader(Path(config.model.path)).names)
    chunks = wrap_data_parallel(modules, config.parallel)
    session = WeightSession(config, planner, chunks, share_parameters(chunks), exchange)
    staging = []
    for everything in (True, False):
        if not everything:
            with torch.no_grad():
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        if parameter.requires_grad:
                            parameter.mul_(1.25).add_(parameter.abs() * 0.125)
        exchange.barrier()
        staging.append(session.executor.run(everything=everything))
        exchange.barrier()
        check(config, session, modules, exchange)
    result = {"staging": staging, "traffic": session.executor.traffic, "wire": planner.wire_elements()}
    shutdown()
    return result


def check(config: Config, session: Any, modules: list, exchange: Any) -> None:
    """Each engine parameter is what its placement takes from the full tensors; its checksum is the expected one."""
    from megatron_mmrl.reshard.checksum import as_number, checksum
    from megatron_mmrl.reshard.memory import typed
    from megatron_mmrl.reshard.reference import export_hf

    planner, rank = session.planner, exchange.rank
    full = {name: tensor.clone() for name, tensor in export_hf(modules)}
    engine = next((e for e, devices in enumerate(planner.devices) if rank in devices), None)
    entries = range(len(planner.engine.table))
    supplied = exchange.all_gather(session.verifier.supplied(entries))
    sums: dict[str, int] = {}
    if engine is not None:
        number = planner.devices[engine].index(rank)
        spec = session.attach_specs(engine, Path("unused"))[number]
        blocks = [block.tensor for block in session.blocks]
        for entry, placement, parameter in zip(
            planner.engine.table, planner.fragments.placements(number), spec.parameters, strict=True
        ):
            made = typed(blocks[parameter.block], parameter.offset, parameter.shape, getattr(torch, parameter.dtype))
            expected = torch.zeros(as_matrix(placement.shape), dtype=made.dtype)
            for piece in placement.pieces:
                tensor = full[entry.hf_names[piece.tensor]]
                cut(expected, piece.at).copy_(cut(tensor.reshape(as_matrix(tuple(tensor.shape))), piece.of))
            assert torch.equal(made.reshape(expected.shape), expected), (entry.name, rank)
            sums[entry.name] = as_number(checksum(made))
    reported = exchange.all_gather(sums)
    for each, devices in enumerate(planner.devices):
        session.verifier.compare(each, entries, supplied, [reported[device] for device in devices])


def run(layout: Layout, models: Path) -> None:
    results = run_ranks(hand_over_twice, layout.world, layout.config(models), layout.per_node)
    item = 2 if layout.bf16 else 4
    moved = sum(result["traffic"].pull + result["traffic"].receive for result in results)
    assert moved == results[0]["wire"] * item
    assert all(size <= BUCKET_BYTES for result in results for size in result["staging"])
    if layout.per_node is not None and layout.per_node < layout.world:
        crossing = sum(result["traffic"].receive for result in results)
        assert (crossing > 0) == any(size > 0 for result in results for size in result["staging"])
    else:
        assert all(result["traffic"].receive == 0 for result in results)


@pytest.mark.parametrize("name", SHORT)
def test_engine_parameters_equal_those_by_names(name: str, models: Path) -> None:
    run(SHORT[name], models)


@pytest.mark.full
@pytest.mark.parametrize("name", LONG)
def test_engine_parameters_equal_those_by_names_on_more_ranks(name: str, models: Path) -> None:
    run(LONG[name], models)
