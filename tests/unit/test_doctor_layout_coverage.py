"""Coverage arithmetic: what is complete passes, and each planted fault is reported by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_mmrl.doctor.coverage import Coverage, Piece, RankShards, Shard, check_coverage
from megatron_mmrl.doctor.layout_trace import trace
from megatron_mmrl.parallel.sharding import QKV, GateUp, Replicated, Row, Rule, Vocab, WeightEntry, padded_vocab_size

NUM_LAYERS, TENSOR, PIPELINE = 4, 2, 2
SHAPES = {
    "model.embed_tokens.weight": (63, 4),
    **{
        f"model.layers.{n}.{name}": shape
        for n in range(NUM_LAYERS)
        for name, shape in {
            "input_layernorm.weight": (4,),
            "self_attn.q_proj.weight": (8, 4),
            "self_attn.k_proj.weight": (4, 4),
            "self_attn.v_proj.weight": (4, 4),
            "mlp.down_proj.weight": (4, 6),
        }.items()
    },
    "model.norm.weight": (4,),
}
VOCAB = Vocab(63)  # padded to 64


def entries(pipeline: int) -> dict[str, tuple[WeightEntry, tuple[int, ...]]]:
    """Parameter -> entry and shape of a shard, for a tied model of two layers per stage."""
    table: dict[str, tuple[WeightEntry, tuple[int, ...]]] = {}
    for layer in range(2):
        prefix = f"model.layers.{2 * pipeline + layer}."
        names = tuple(f"{prefix}self_attn.{x}_proj.weight" for x in "qkv")
        qkv = QKV(heads=4, groups=2, head_dim=2)
        table[f"{layer}.norm"] = (entry(Replicated(), f"{prefix}input_layernorm.weight"), (4,))
        table[f"{layer}.qkv"] = (WeightEntry(hf_names=names, rule=qkv), (8, 4))
        table[f"{layer}.down"] = (entry(Row(), f"{prefix}mlp.down_proj.weight"), (4, 3))
    embedding = WeightEntry(hf_names=("model.embed_tokens.weight",), rule=VOCAB, exported=pipeline == 0)
    table["output" if pipeline else "embedding"] = (embedding, (32, 4))
    if pipeline:
        table["final_norm"] = (entry(Replicated(), "model.norm.weight"), (4,))
    return table


def entry(rule: Rule, *names: str) -> WeightEntry:
    return WeightEntry(hf_names=names, rule=rule)


def rank_shards(tensor: int, pipeline: int) -> RankShards:
    shards = []
    for name, (row, shape) in entries(pipeline).items():
        role, pieces, padding = trace(row, SHAPES, tensor, TENSOR)
        shards.append(Shard(parameter=name, shape=shape, pieces=pieces, padding=padding, role=role))
    return RankShards(tensor=tensor, pipeline=pipeline, chunks=(tuple(shards),))


def all_ranks() -> list[RankShards]:
    return [rank_shards(tensor, pipeline) for pipeline in range(PIPELINE) for tensor in range(TENSOR)]


def change(ranks: list[RankShards], index: int, parameter: str, **changes: object) -> list[RankShards]:
    """The ranks with one shard changed; without changes, dropped."""
    shards = [
        replace(shard, **changes) if shard.parameter == parameter else shard
        for shard in ranks[index].shards
        if changes or shard.parameter != parameter
    ]
    changed = replace(ranks[index], chunks=(tuple(shards),))
    return [*ranks[:index], changed, *ranks[index + 1 :]]


def test_a_complete_model_passes_and_adds_up() -> None:
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert check_coverage(SHAPES, all_ranks()) == Coverage(
        problems=(),
        num_tensors=22,
        num_parameters=total,
        replicated=5 * 4,
        copied=63 * 4,
        padding=2 * 1 * 4,
    )


def test_a_dropped_layer_is_named() -> None:
    ranks = all_ranks()
    for index in (0, 1):
        kept = tuple(shard for shard in ranks[index].shards if not shard.parameter.startswith("1."))
        ranks[index] = replace(ranks[index], chunks=(kept,))
    assert check_coverage(SHAPES, ranks).problems == ("model.layers.1: no rank holds any of its 5 tensors",)


def test_a_missing_tensor_and_one_that_does_not_exist_are_named() -> None:
    shapes = {**SHAPES, "lm_head.weight": (7, 4)}
    assert check_coverage(shapes, all_ranks()).problems == ("lm_head.weight: no rank holds it",)
    without = {name: shape for name, shape in SHAPES.items() if name != "model.norm.weight"}
    assert check_coverage(without, all_ranks()).problems == (
        "model.norm.weight is held, but is no tensor of the checkpoint",
    )


def test_a_doubled_column_and_the_gap_beside_it_are_named() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    shifted = (Piece(name=name, rows=(0, 4), columns=(2, 5)),)  # right: 3-6
    assert check_coverage(SHAPES, change(all_ranks(), 1, "0.down", pieces=shifted)).problems == (
        f"{name}: tensor ranks [0, 1] all hold columns 2-2",
        f"{name}: no rank holds columns 5-5",
    )
    wider = (Piece(name=name, rows=(0, 4), columns=(2, 6)),)
    assert check_coverage(SHAPES, change(all_ranks(), 1, "0.down", pieces=wider)).problems == (
        "0.down of tensor rank 1, pipeline rank 0 has shape [4, 3], that is 12 numbers, but its pieces of "
        f"{name} have 16",
        f"{name}: tensor ranks [0, 1] all hold columns 2-2",
    )


def test_a_shard_that_is_missing_on_one_rank_is_named() -> None:
    assert check_coverage(SHAPES, change(all_ranks(), 3, "0.qkv")).problems == (
        "model.layers.2.self_attn.q_proj.weight: no rank holds rows 4-7",
        "model.layers.2.self_attn.k_proj.weight: no rank holds rows 2-3",
        "model.layers.2.self_attn.v_proj.weight: no rank holds rows 2-3",
    )
    assert check_coverage(SHAPES, change(all_ranks(), 1, "0.norm")).problems == (
        "model.layers.0.input_layernorm.weight on tensor rank 1: no rank holds all of it",
    )


def test_a_block_outside_of_a_tensor_is_named() -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    outside = (Piece(name=name, rows=(0, 4), columns=(3, 7)),)
    problems = check_coverage(SHAPES, change(all_ranks(), 1, "0.down", pieces=outside)).problems
    assert f"{name}: tensor rank 1 holds columns 6-6, outside of its shape [4, 6]" in problems


def test_swapped_tensor_ranks_are_named() -> None:
    first, second, *others = all_ranks()
    swapped = [replace(second, tensor=0), replace(first, tensor=1), *others]
    problems = check_coverage(SHAPES, swapped).problems
    assert len(problems) == 1 + 2 * 4  # embedding; q, k, v and down of two layers
    assert (
        "model.layers.0.mlp.down_proj.weight: tensor rank 0 holds what comes after the part of tensor rank 1 (from row "
        "0, column 3, against row 0, column 0): swapped ranks?"
    ) in problems


def test_swapped_pipeline_ranks_are_named() -> None:
    swapped = [replace(rank, pipeline=1 - rank.pipeline) for rank in all_ranks()]
    assert check_coverage(SHAPES, swapped).problems == (
        "layer 1 is on stage 1, after layer 2 on stage 0: swapped stages?",
        "model.embed_tokens.weight is on stage 1, but belongs to stage 0 of 0-1: swapped stages?",
        "model.norm.weight is on stage 0, but belongs to stage 1 of 0-1: swapped stages?",
    )


def test_chunks_count_as_stages_in_the_order_of_the_forward_pass() -> None:
    """Two pipeline ranks of two chunks: layers 0 and 2 on the first, 1 and 3 on the second."""
    ranks = []
    for tensor in range(TENSOR):
        chunks = [
            [[shard for shard in rank_shards(tensor, p).shards if shard.parameter[0] == c] for c in "01"]
            for p in range(PIPELINE)
        ]
        top = [[s for s in rank_shards(tensor, p).shards if s.parameter[0] not in "01"] for p in range(PIPELINE)]
        for rank in range(PIPELINE):
            own = (tuple(top[0] * (rank == 0) + chunks[0][rank]), tuple(chunks[1][rank] + top[1] * (rank == 1)))
            ranks.append(RankShards(tensor=tensor, pipeline=rank, chunks=own))
    assert check_coverage(SHAPES, ranks).problems == ()
    backwards = [replace(rank, chunks=rank.chunks[::-1]) for rank in ranks]
    assert (
        "layer 1 is on stage 3, after layer 2 on stage 0: swapped stages?" in check_coverage(SHAPES, backwards).problems
    )


def test_a_tensor_on_two_stages_and_one_without_an_exporter_are_named() -> None:
    ranks = all_ranks()
    twice = change(change(ranks, 2, "output", role="part"), 3, "output", role="part")
    assert check_coverage(SHAPES, twice).problems == (
        "model.embed_tokens.weight is held by stages [0, 1] as ['part']: one stage and one way of holding is right",
    )
    never = change(change(ranks, 0, "embedding"), 1, "embedding")
    assert check_coverage(SHAPES, never).problems == (
        "model.embed_tokens.weight is held as a copy only: no rank exports it",
    )


def test_half_a_copy_of_the_tied_embedding_is_named() -> None:
    assert check_coverage(SHAPES, change(all_ranks(), 2, "output")).problems == (
        "model.embed_tokens.weight (the second copy): no rank holds rows 0-31",
    )


def test_an_absent_rank_is_named() -> None:
    ranks = all_ranks()
    problems = check_coverage(SHAPES, [ranks[0], *ranks[2:]]).problems
    assert problems[0] == "nothing is known of tensor rank 1 in pipeline rank 0"
    assert "model.layers.0.mlp.down_proj.weight: no rank holds columns 3-5" in problems


RULES = [
    (Replicated(), [(5, 3)], (1, 2)),
    (Replicated(), [(4, 3, 2, 7, 7)], (1, 2)),
    (Row(), [(3, 8)], (1, 2, 4, 8)),
    (GateUp(), [(8, 3), (8, 3)], (1, 2, 4, 8)),
    (Vocab(10), [(10, 3)], (1, 2, 4, 8)),
    (QKV(heads=8, groups=2, head_dim=3), [(24, 5), (6, 5), (6, 5)], (1, 2, 4)),
    (QKV(heads=8, groups=2, head_dim=3), [(24,), (6,), (6,)], (1, 2, 4)),
]


@pytest.mark.parametrize(("rule", "shapes", "sizes"), RULES, ids=str)
def test_traced_blocks_are_what_the_rule_really_takes(
    rule: Rule, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]
) -> None:
    """Real tensors of distinct numbers, cut by the rule, hold what the trace says."""
    names = tuple(f"t{i}" for i in range(len(shapes)))
    offsets = [1 + 10_000 * i for i in range(len(shapes))]
    full = [
        torch.arange(first, first + torch.Size(shape).numel()).view(shape)
        for first, shape in zip(offsets, shapes, strict=True)
    ]
    for size in sizes:
        for rank in range(size):
            role, pieces, padding = trace(entry(rule, *names), dict(zip(names, shapes, strict=True)), rank, size)
            blocks = [_block(full[names.index(piece.name)], piece) for piece in pieces]
            traced = torch.cat([*blocks, torch.zeros(padding, dtype=torch.int64)])
            assert traced.sort().values.equal(rule.split(full, rank, size).flatten().sort().values)
            assert role == ("replica" if isinstance(rule, Replicated) else "part")


def _block(full: Tensor, piece: Piece) -> Tensor:
    return (
        full.flatten(1)[slice(*piece.rows), slice(*piece.columns)].flatten()
        if full.dim() > 1
        else full[slice(*piece.rows)]
    )


def test_a_vocabulary_shard_may_be_padding_alone() -> None:
    assert padded_vocab_size(5, 4) == 64
    _, pieces, padding = trace(entry(Vocab(5), "t"), {"t": (5, 3)}, 3, 4)
    assert (pieces, padding) == ((), 16 * 3)


def test_a_copy_is_told_from_the_original() -> None:
    copied = WeightEntry(hf_names=("t",), rule=Vocab(8), exported=False)
    assert trace(copied, {"t": (8, 3)}, 0, 2)[0] == "copy"


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight table wants \['t'\], which the Hugging Face model does not have"):
        trace(entry(Row(), "t"), {}, 0, 1)
    with pytest.raises(ValueError, match="only rows, or columns of a matrix"):
        trace(entry(Row(), "t"), {"t": (2, 4, 3)}, 0, 2)
