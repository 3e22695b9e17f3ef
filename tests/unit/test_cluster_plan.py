"""Where ranks and engines would be, and what is refused."""

from __future__ import annotations

import pytest

from megatron_mmrl.cluster.describe import describe
from megatron_mmrl.cluster.plan import Topology, own_devices, plan_launch, topology_of
from megatron_mmrl.config import Config, ConfigError, load_config
from tests.e2e.run import CONFIG


def config_of(*overrides: str) -> Config:
    return load_config(CONFIG, ["parallel.pipeline_model_parallel_size=2", *overrides])  # tensor 2 x pipeline 2


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_share_out_over_nodes(nodes: int, per_node: int) -> None:
    topology = topology_of(config_of(), nodes)
    assert topology == Topology(num_nodes=nodes, ranks_per_node=per_node) == topology_of(config_of(), nodes, per_node)
    assert [rank for node in range(nodes) for rank in topology.ranks_of(node)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("nodes", "per_node", "message"),
    [
        (3, None, "--nodes 3 does not divide the 4 ranks of the layout; use one of [1, 2, 4]"),
        (0, None, "--nodes 0 does not divide the 4 ranks of the layout; use one of [1, 2, 4]"),
        (2, 8, "--nodes 2 x --gpus-per-node 8 are 16 devices, but the parallel sizes need 4; set "
               "parallel.data_parallel_size or the number of nodes"),
    ],
)  # fmt: skip
def test_an_uneven_share_is_refused(nodes: int, per_node: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        topology_of(config_of(), nodes, per_node)
    assert str(refusal.value) == message


def test_ranks_and_engines_have_their_places() -> None:
    config = config_of("rollout.num_engines=2", "rollout.tensor_parallel_size=2")
    plan = plan_launch(config, topology_of(config, 2), own_devices(config))
    assert [(place.rank, place.node, place.device) for place in plan.ranks] == [
        (0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1),
    ]  # fmt: skip
    assert [(place.at.tensor, place.at.pipeline) for place in plan.ranks] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [(place.engine, place.node, place.leader, place.ranks) for place in plan.engines] == [
        (0, 0, 0, (0, 1)),
        (1, 1, 2, (2, 3)),
    ]


def test_an_engine_across_nodes_is_refused() -> None:
    config = config_of("rollout.tensor_parallel_size=4")
    with pytest.raises(ConfigError, match=r"engine 0 would run on nodes \[0, 1\]; .* within the 2 ranks of a node"):
        plan_launch(config, topology_of(config, 2), own_devices(config))


def test_the_description_is_the_configuration_and_a_map() -> None:
    config = config_of("rollout.num_engines=2")
    plan = plan_launch(config, topology_of(config, 2), own_devices(config))
    text = describe(config, plan)
    assert text == describe(config, plan)
    head, _, table = text.partition("# 2 node(s) x 2 = 4 ranks\n")
    assert "pipeline_model_parallel_size: 2\n" in head
    rows = [line.removeprefix("#").split() for line in table.splitlines()]
    assert rows[1] == ["rank", "node", "device", "tensor", "pipeline", "context", "data"]
    assert rows[5] == ["3", "1", "1", "1", "1", "0", "0"]
    assert rows[-1] == ["1", "1", "2", "2"]
