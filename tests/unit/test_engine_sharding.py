"""How SGLang cuts and pads weights, on shapes of the published models; and the blocks behind Megatron's shards."""

from __future__ import annotations

import pytest
import torch

from megatron_mmrl.parallel.engine_sharding import Columns, Heads, Rows, VocabRows, Whole
from megatron_mmrl.parallel.geometry import Piece, Rect, shard_placement
from megatron_mmrl.parallel.sharding import QKV, GateUp, Replicated, Row, Rule, Vocab
from tests.unit.reshard_case import cut, numbered


def test_vision_mlp_is_padded_to_a_multiple_of_8() -> None:
    """3420 -> 3424 rows: at TP 2 the second rank's 1712 hold 1708 real ones, then 4 of zeros, of gate and of up."""
    placement = Rows(multiple_of=8).place([(3420, 1280), (3420, 1280)], 1, 2)
    assert placement.shape == (2 * 1712, 1280)
    real = Rect(1712, 3420, 0, 1280)
    assert placement.pieces == (
        Piece(0, real, Rect(0, 1708, 0, 1280)),
        Piece(1, real, Rect(1712, 1712 + 1708, 0, 1280)),
    )
    down = Columns(multiple_of=8).place([(1280, 3420)], 1, 2)
    assert (down.shape, down.pieces) == ((1280, 1712), (Piece(0, Rect(0, 1280, 1712, 3420), Rect(0, 1280, 0, 1708)),))


@pytest.mark.parametrize(
    ("vocab", "size", "rows"), [(151936, 8, 18992), (152064, 8, 19008), (151936, 4, 37984), (100, 3, 64), (10, 4, 16)]
)
def test_vocabulary_is_padded_to_64_or_to_64_for_each_rank(vocab: int, size: int, rows: int) -> None:
    assert {VocabRows().place([(vocab, 8)], rank, size).shape for rank in range(size)} == {(rows, 8)}
    held = sum(piece.of.size for rank in range(size) for piece in VocabRows().place([(vocab, 8)], rank, size).pieces)
    assert held == vocab * 8


def test_key_heads_are_repeated_where_ranks_outnumber_them() -> None:
    """3B at TP 8: 16 heads, 2 groups; ranks 0 to 3 hold head 0's key and value, 4 to 7 that of head 1."""
    shapes = [(2048, 2048), (256, 2048), (256, 2048)]
    for rank in range(8):
        query, key, value = Heads(16, 2, 128).place(shapes, rank, 8).pieces
        assert (query.of.top, query.of.bottom) == (rank * 256, rank * 256 + 256)
        assert (key.of.top, value.of.top) == (rank // 4 * 128, rank // 4 * 128)
        assert (key.at.top, value.at.top) == (256, 384)


def test_one_fused_tensor_is_read_in_three_parts() -> None:
    query, key, value = Heads(16, 16, 80).place([(3840, 1280)], 1, 2).pieces
    assert [piece.of.top for piece in (query, key, value)] == [640, 1280 + 640, 2560 + 640]
    assert [piece.at.top for piece in (query, key, value)] == [0, 640, 1280]
    assert {piece.tensor for piece in (query, key, value)} == {0}


def test_whole_tensors_keep_their_shape() -> None:
    placement = Whole().place([(1280, 3, 2, 14, 14)], 3, 4)
    assert (placement.shape, placement.pieces[0].at) == ((1280, 3, 2, 14, 14), Rect(0, 1280, 0, 1176))


@pytest.mark.parametrize(
    ("rule", "shapes", "size"),
    [
        (Rows(), [(10, 4)], 4),
        (Heads(28, 4, 128), [(3584, 8), (512, 8), (512, 8)], 8),
        (Heads(24, 3, 8), [(192, 8), (24, 8), (24, 8)], 2),
    ],
)
def test_what_does_not_divide_is_refused(rule: Rows | Heads, shapes: list[tuple[int, int]], size: int) -> None:
    with pytest.raises(ValueError, match="cannot be divided over"):
        rule.place(shapes, 0, size)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("rule", "shapes"),
    [
        (QKV(heads=8, groups=2, head_dim=3), [(24, 5), (6, 5), (6, 5)]),
        (QKV(heads=8, groups=4, head_dim=3), [(24,), (12,), (12,)]),
        (GateUp(), [(12, 5), (12, 5)]),
        (Row(), [(5, 12)]),
        (Replicated(), [(4, 3, 2)]),
        (Vocab(13), [(13, 5)]),
    ],
)
def test_traced_blocks_are_what_a_rule_makes(rule: Rule, shapes: list[tuple[int, ...]], size: int) -> None:
    full = list(numbered({str(number): shape for number, shape in enumerate(shapes)}).values())
    for rank in range(size):
        placement = shard_placement(rule, tuple(shapes), rank, size)
        shard = rule.split(full, rank, size)
        assert placement.shape == tuple(shard.shape)
        made = torch.zeros_like(shard).flatten(1) if shard.dim() > 1 else torch.zeros_like(shard)[:, None]
        for piece in placement.pieces:
            matrix = full[piece.tensor].reshape(len(full[piece.tensor]), -1)
            cut(made, piece.at).copy_(cut(matrix, piece.of))
        assert torch.equal(made.view(shard.shape), shard)


def test_a_slice_that_cannot_be_traced_is_refused() -> None:
    class Odd:
        def split(self, full: list, rank: int, size: int) -> torch.Tensor:
            return full[0][:, ::2]

    with pytest.raises(ValueError, match="can be traced"):
        shard_placement(Odd(), ((4, 4),), 0, 1)  # type: ignore[arg-type]
