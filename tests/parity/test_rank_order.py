"""``ParallelLayout`` numbers ranks as Megatron does."""

from collections import defaultdict

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_mmrl.parallel.layout import ParallelLayout


@pytest.mark.parametrize(("axis", "name"), [("tensor", "tp"), ("context", "cp"), ("data", "dp"), ("pipeline", "pp")])
def test_groups_equal_megatrons(axis: str, name: str) -> None:
    layout = ParallelLayout(tensor=2, context=2, data=3, pipeline=2)
    oracle = RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    groups = defaultdict(list)
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        others = tuple(getattr(at, other) for other in ("tensor", "context", "data", "pipeline") if other != axis)
        groups[others].append(rank)
    assert sorted(groups.values()) == sorted(oracle.get_ranks(name))
