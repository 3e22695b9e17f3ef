"""The plan gives every engine rank exactly its parameters, over the fewest bytes, and every rank agrees on it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.reshard_bytes import least_elements
from megatron_mmrl.parallel.geometry import as_matrix
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.reshard.plan import Planner
from tests.unit.reshard_case import (
    CONFIG,
    cut,
    filled,
    hf_shapes,
    least_wire_elements,
    numbered,
    planner_for,
    shards,
)

TIED = CONFIG | {"tie_word_embeddings": True}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, int], int, int]] = {
    # name: model, trainer's sizes, ranks of an engine, engines
    "equal": (CONFIG, {"tensor": 2}, 2, 1),
    "one for two": (CONFIG, {"tensor": 2}, 1, 2),
    "engine narrower": (CONFIG, {"tensor": 4}, 2, 2),
    "engine narrower, ranks to spare": (CONFIG, {"tensor": 4}, 2, 1),
    "engine wider": (CONFIG, {"tensor": 2, "pipeline": 2}, 4, 1),
    "virtual pipeline": (CONFIG, {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2}, 2, 1),
    "replicas": (CONFIG, {"tensor": 2, "pipeline": 2, "data": 2}, 4, 2),
    "context": (CONFIG, {"tensor": 2, "context": 2}, 4, 1),
    "data alone": (CONFIG, {"data": 4}, 4, 1),
    "tied": (TIED, {"tensor": 2, "pipeline": 2}, 2, 2),
    "tied, one stage": (TIED, {"tensor": 2}, 2, 1),
    "more ranks than groups": (CONFIG, {"tensor": 4}, 4, 1),
}


@pytest.fixture(params=LAYOUTS, ids=list(LAYOUTS))
def case(request: pytest.FixtureRequest) -> tuple[Planner, dict[str, torch.Tensor]]:
    config, sizes, tensor, engines = LAYOUTS[request.param]
    planner = planner_for(config, ParallelLayout(**sizes), tensor=tensor, engines=engines)
    return planner, numbered(hf_shapes(config))


def test_moves_make_every_parameter_of_every_engine_rank(case: tuple[Planner, dict[str, torch.Tensor]]) -> None:
    planner, full = case
    layout = planner.trainer.layout
    for device, rank in planner.runs.items():
        placements = planner.fragments.placements(rank)
        made = [torch.zeros(as_matrix(placement.shape), dtype=torch.int64) for placement in placements]
        for move in planner.incoming(device):
            at = layout.coordinates(move.peer)
            source = shards(planner, full, at.pipeline, at.tensor)[move.fragment.held]
            if move.kind == "alias":
                made[move.fragment.entry] = source
            else:
                cut(made[move.fragment.entry], move.fragment.target).copy_(cut(source, move.fragment.source))
        for entry, placement, matrix in zip(planner.engine.table, placements, made, strict=True):
            assert torch.equal(matrix, filled(placement, [full[name] for name in entry.hf_names])), entry.name


def test_wire_elements_are_the_fewest_possible(case: tuple[Planner, dict[str, torch.Tensor]]) -> None:
    planner, full = case
    assert planner.wire_elements() == least_wire_elements(planner, full)


def test_the_benchmark_counts_the_same_minimum(case: tuple[Planner, dict[str, torch.Tensor]]) -> None:
    planner, full = case
    config_shapes = {name: tuple(tensor.shape) for name, tensor in full.items()}
    assert least_elements(planner, config_shapes) == least_wire_elements(planner, full)


def test_what_one_sends_is_what_the_other_expects(case: tuple[Planner, dict[str, torch.Tensor]]) -> None:
    planner, _ = case
    ranks = range(planner.trainer.layout.world_size)
    sent = {(rank, peer): [] for rank in ranks for peer in ranks}
    expected = {pair: [] for pair in sent}
    for rank in ranks:
        for move in planner.outgoing(rank):
            sent[rank, move.peer].append(move.fragment)
        for move in planner.incoming(rank):
            if move.kind == "receive":
                assert move.peer != rank
                expected[move.peer, rank].append(move.fragment)
    assert sent == expected
    received = sum(fragment.source.size for fragments in expected.values() for fragment in fragments)
    assert received == planner.wire_elements()


def test_every_rank_makes_the_same_plan() -> None:
    config, sizes, tensor, engines = LAYOUTS["replicas"]
    one, other = (planner_for(config, ParallelLayout(**sizes), tensor=tensor, engines=engines) for _ in range(2))
    other.outgoing(5)  # what was asked before changes nothing
    assert one.devices == other.devices
    assert one.suppliers == other.suppliers
    assert all(one.incoming(rank) == other.incoming(rank) for rank in range(8))


def names(planner: Planner, device: int, *kinds: str) -> set[str]:
    return {planner.engine.table[move.fragment.entry].name for move in planner.incoming(device) if move.kind in kinds}


def test_equal_sizes_with_one_group_a_rank_share_the_whole_language_model() -> None:
    planner = planner_for(CONFIG | {"vocab_size": 128}, ParallelLayout(tensor=2), tensor=2, whole_encoder=True)
    assert planner.wire_elements() == 0
    for device in range(2):
        copied = names(planner, device, "copy")
        # The trainer keeps the vision tower's gate and up apart, and SGLang pads them.
        assert {name.split(".", 3)[3] for name in copied} == {
            "mlp.gate_up_proj.weight",
            "mlp.gate_up_proj.bias",
            "mlp.down_proj.weight",
        }
        assert all(name.startswith("visual.") for name in copied)


def test_a_vocabulary_that_needs_padding_is_shared() -> None:
    """75 words: both sides pad them to 128, so the second rank holds 11 of them and zeros."""
    planner = planner_for(CONFIG, ParallelLayout(tensor=2), tensor=2)
    for device in range(2):
        assert names(planner, device, "alias") >= {"model.embed_tokens.weight", "lm_head.weight"}
        assert not names(planner, device, "receive")


def test_load_is_spread_over_replicas() -> None:
    """Always the least loaded of a stage's 4 replicas: their loads differ by no more than the largest single supply."""
    planner = planner_for(CONFIG, ParallelLayout(pipeline=2, data=4), tensor=2, engines=4)
    served = [Counter[int]() for _ in range(8)]
    for rank, peers in enumerate(served):
        for move in planner.outgoing(rank):
            peers[move.peer] += move.fragment.source.size
    for stage in (served[:4], served[4:]):
        loads = [peers.total() for peers in stage]
        largest = max(size for peers in stage for size in peers.values())
        assert min(loads) > 0
        assert max(loads) - min(loads) <= largest


def test_engines_of_a_node_choose_among_all_of_its_devices() -> None:
    """Engine rank r of 4 needs the shards of trainer ranks 2r and 2r + 1: with one of them at home, half moves."""
    config = CONFIG | {"num_key_value_heads": 8}
    planner = planner_for(config, ParallelLayout(tensor=8), tensor=4, engines=2)
    assert planner.devices == ((0, 2, 4, 6), (1, 3, 5, 7))
    moved = sum(move.fragment.source.size for device in range(8) for move in planner.incoming(device))
    at_home = sum(
        move.fragment.source.size for device in range(8) for move in planner.incoming(device) if move.peer == device
    )
    assert planner.wire_elements() < 0.5 * moved  # replicated norms are at home, too
    assert planner.wire_elements() == moved - at_home


@pytest.mark.parametrize(("per_node", "expected"), [(4, {0, 1}), (2, {0, 1, 2, 3})])
def test_engines_stay_on_the_node_of_their_leader(per_node: int, expected: set[int]) -> None:
    planner = planner_for(CONFIG, ParallelLayout(tensor=2, data=4), tensor=2, engines=4)
    nodes = Planner(
        dataclasses.replace(planner.trainer, ranks_per_node=per_node), planner.engine, planner.fragments.shapes
    ).devices
    assert [{device // per_node for device in devices} for devices in nodes] == [
        {engine * 2 // per_node} for engine in range(4)
    ]
    assert {engine * 2 // per_node for engine in range(4)} == expected


def test_the_nearest_replica_sends() -> None:
    """Two nodes of 8 ranks, each with all stages: nothing has to cross between them."""
    layout = ParallelLayout(tensor=2, data=8)
    planner = planner_for(CONFIG, layout, tensor=1, engines=16)
    for rank in range(16):
        assert {move.peer // 8 for move in planner.incoming(rank)} == {rank // 8}


def test_engines_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 engines of 4 ranks each do not fit on 4 trainer ranks"):
        planner_for(CONFIG, ParallelLayout(tensor=4), tensor=4, engines=2)


def test_a_tensor_that_no_stage_holds_is_named() -> None:
    planner = planner_for(CONFIG, ParallelLayout(pipeline=2), tensor=1)
    missing = tuple(held for held in planner.trainer.held if "model.norm.weight" not in held.entry.hf_names)
    trainer = type(planner.trainer)(layout=planner.trainer.layout, held=missing)
    with pytest.raises(ValueError, match=r"model\.norm\.weight, which no trainer rank holds"):
        Planner(trainer, planner.engine, hf_shapes(CONFIG))
