"""Each rule cuts where Megatron expects it, and puts together what it cut."""

import pytest
import torch

from megatron_mmrl.parallel.sharding import QKV, GateUp, Replicated, Row, Rule, Vocab, padded_vocab_size


def numbered(*shape: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_qkv_goes_group_by_group() -> None:
    """4 heads in 2 groups, head dimension 1: rank 0 of 2 holds q0 q1 k0 v0, rank 1 q2 q3 k1 v1."""
    rule = QKV(heads=4, groups=2, head_dim=1)
    q, k, v = torch.tensor([10.0, 11, 12, 13]), torch.tensor([20.0, 21]), torch.tensor([30.0, 31])
    assert rule.split([q, k, v], 0, 1).tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    assert rule.split([q, k, v], 0, 2).tolist() == [10, 11, 20, 30]
    assert rule.split([q, k, v], 1, 2).tolist() == [12, 13, 21, 31]


def test_qkv_rows_are_cut_inside_a_group_where_ranks_outnumber_groups() -> None:
    """2 heads in 1 group, head dimension 3: 12 rows q0 q0 q0 q1 q1 q1 k k k v v v, and 4 ranks."""
    rule = QKV(heads=2, groups=1, head_dim=3)
    q, k, v = numbered(6, 1), numbered(3, 1, first=10), numbered(3, 1, first=20)
    shards = [rule.split([q, k, v], rank, 4).flatten().tolist() for rank in range(4)]
    assert shards == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [20, 21, 22]]
    shards = [rule.split([q, k, v], rank, 3).flatten().tolist() for rank in range(3)]
    assert shards == [[0, 1, 2, 3], [4, 5, 10, 11], [12, 20, 21, 22]]


class OnlySlices:
    """A file's tensor: knows its shape, and counts the rows that are read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.shape, self.rows_read = tensor, tensor.shape, 0

    def __getitem__(self, key: slice) -> torch.Tensor:
        self.rows_read += self._tensor[key].shape[0]
        return self._tensor[key]


def test_a_rank_reads_its_share_and_no_more() -> None:
    rule = QKV(heads=8, groups=2, head_dim=2)
    full = [OnlySlices(numbered(rows, 3)) for rows in (16, 4, 4)]
    assert rule.split(full, 2, 8).shape == (3, 3)
    assert sum(tensor.rows_read for tensor in full) == 3


def test_gate_and_up_are_halved_before_they_are_joined() -> None:
    gate, up = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8])
    assert GateUp().split([gate, up], 1, 2).tolist() == [3, 4, 7, 8]


def test_vocabulary_is_padded_with_zero_rows() -> None:
    full = numbered(65, 2, first=1)
    assert [padded_vocab_size(65, ranks) for ranks in (1, 2, 3, 4)] == [128, 128, 192, 128]
    assert torch.equal(Vocab(65).split([full], 0, 2), full[:64])
    assert Vocab(65).split([full], 1, 2).tolist() == [[129, 130], *[[0, 0]] * 63]
    assert torch.equal(Vocab(65, padded=False).split([full], 0, 1), full)
    assert torch.equal(Vocab(65, padded=False).merge([torch.cat([full, torch.zeros(3, 2)])])[0], full)


def test_rows_divide_input_features() -> None:
    assert Row().split([numbered(2, 4)], 1, 2).tolist() == [[2, 3], [6, 7]]


CASES = {
    "replicated": (Replicated(), [(6,)]),
    "row": (Row(), [(3, 8)]),
    "qkv weight": (QKV(heads=8, groups=4, head_dim=3), [(24, 5), (12, 5), (12, 5)]),
    "qkv bias": (QKV(heads=8, groups=4, head_dim=3), [(24,), (12,), (12,)]),
    "qkv weight, shared heads": (QKV(heads=4, groups=1, head_dim=6), [(24, 5), (6, 5), (6, 5)]),
    "gate and up": (GateUp(), [(8, 5), (8, 5)]),
    "vocabulary": (Vocab(9), [(9, 5)]),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_merge_undoes_split(name: str, size: int) -> None:
    rule: Rule
    rule, shapes = CASES[name]
    full = [numbered(*shape, first=1000 * i) for i, shape in enumerate(shapes)]
    shards = [rule.split(full, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    merged = rule.merge(shards)
    assert len(merged) == len(full)
    assert all(torch.equal(a, b) for a, b in zip(merged, full, strict=True))


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8 rows or columns cannot be divided over 3"):
        Row().split([numbered(2, 8)], 0, 3)
