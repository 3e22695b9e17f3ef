"""A hand-over as engines see it: nothing is computed from half of an update, and a wrong bit does not go unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mmrl.algorithms.registry import build_algorithm
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.parallel.geometry import as_matrix
from megatron_mmrl.rollout.engine import EngineError
from tests.dist.launch import run_ranks
from tests.dist.policy_case import build, config_of, make_sequences

OVERLAP = ("parallel.data_parallel_size=2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
           "optim.lr=1e-2", "optim.warmup_updates=0", "optim.schedule=constant")  # fmt: skip


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_mmrl.models.tiny import TinySizes, make_tiny_checkpoint

    path = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(path, sizes=TinySizes(vision_intermediate=60))  # which SGLang pads
    return path


class Engine:
    """A real engine's loaders on a module with its parameters, in this process; notes what it is asked."""

    def __init__(self, planner) -> None:
        from megatron_mmrl.reshard.attach import Ranks

        self.asked: list[str] = []
        self.model = torch.nn.Module()
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for entry, placement in zip(planner.engine.table, planner.fragments.placements(0), strict=True):
            self.parameters[entry.name] = torch.nn.Parameter(torch.full(placement.shape, 7.0))
        self.model.named_parameters = lambda: self.parameters.items()  # their names have dots
        self._ranks = Ranks(rank=0, size=1, all_gather=lambda finding: [finding])
        self.before_sums: Callable[[], None] = lambda: None

    def tell_ranks(self, what: str, messages: list[str]) -> None:
        from megatron_mmrl.reshard.attach import attach_weights, sum_weights

        self.asked.append(what)
        sent = [("message", torch.tensor(list(messages[0].encode()), dtype=torch.uint8))]
        if what == "attach":
            attach_weights(self.model, sent, self._ranks)
        else:
            self.before_sums()
            sum_weights(self.model, sent, 0)

    def pause(self) -> None:
        self.asked.append("pause")

    def set_version(self, version: int) -> None:
        self.asked.append(f"version {version}")

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


class Fleet:
    """One engine, led by rank 0; a failure is known to all."""

    def __init__(self, engine: Engine | None, exchange) -> None:
        self.engine, self._exchange = engine, exchange

    def everywhere(self, work) -> None:
        error = None
        try:
            if self.engine:
                work(0, self.engine)
        except EngineError as caught:
            error = caught
        for failure in self._exchange.all_gather(error):
            if failure:
                raise failure

    def pause(self) -> None:
        self.everywhere(lambda _, engine: engine.pause())


def start(config: Config):
    """(policy, packer, weights, fleet, planner, exchange) of this rank."""
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.reshard.publish import SharedWeights
    from megatron_mmrl.reshard.between import planner_of
    from megatron_mmrl.reshard.session import WeightSession

    policy, packer = build(config)
    exchange, planner = Collectives(), planner_of(config)
    session = WeightSession(config, planner, policy.chunks, policy.shared, exchange)
    fleet = Fleet(Engine(planner) if exchange.rank == 0 else None, exchange)
    weights = SharedWeights(session, fleet, exchange, policy.finish_updates)
    return policy, packer, weights, fleet, session, exchange


def expected(policy, planner) -> dict[str, torch.Tensor]:
    """The engine's weights, made from full tensors. Does not finish updates."""
    from megatron_mmrl.reshard.reference import export_hf
    from tests.unit.reshard_case import cut

    full = {name: tensor.clone() for name, tensor in export_hf([chunk.module for chunk in policy.chunks])}
    made = {}
    for entry, placement in zip(planner.engine.table, planner.fragments.placements(0), strict=True):
        matrix = torch.zeros(as_matrix(placement.shape))
        for piece in placement.pieces:
            tensor = full[entry.hf_names[piece.tensor]]
            cut(matrix, piece.at).copy_(cut(tensor.reshape(as_matrix(tuple(tensor.shape))), piece.of))
        made[entry.name] = matrix.reshape(placement.shape)
    return made


def stale(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def overlapped_update(config: Config) -> dict[str, object]:
    from megatron_mmrl.parallel.state import shutdown

    policy, packer, weights, fleet, session, _ = start(config)
    policy.start_optimizer(config.optim, total_updates=4)
    weights.publish(0)
    batch = packer.pack(make_sequences(config)).batch
    policy.update(batch, build_algorithm(config.algorithm).loss)
    half_done = expected(policy, session.planner)  # of this replica, before the others' shares have come
    if fleet.engine:
        fleet.engine.asked.clear()
    weights.publish(1)
    done = expected(policy, session.planner)
    shutdown()
    if not fleet.engine:
        return {}
    return {
        "stale before": stale(half_done, done),
        "stale after": stale(fleet.engine.weights(), done),
        "asked": fleet.engine.asked,
    }


def test_a_hand_over_finishes_what_is_under_way(model_path: Path) -> None:
    result = run_ranks(overlapped_update, 2, config_of(model_path, *OVERLAP))[0]
    assert result["stale before"], "the update was not overlapped, so the test shows nothing"
    assert result["stale after"] == []
    assert result["asked"] == ["pause", "checksums", "version 1"]


def flipped(config: Config) -> dict[str, object]:
    """A bit of one tensor flips between the plan and the comparison; then right weights come, then a new engine."""
    from megatron_mmrl.parallel.state import shutdown

    policy, _, weights, fleet, session, _ = start(config)
    weights.publish(0)
    results: dict[str, object] = {}
    name = "visual.blocks.1.mlp.gate_up_proj.weight"  # never shared: the trainer keeps gate and up apart

    def flip() -> None:
        fleet.engine.parameters[name].data.view(torch.int32).view(-1)[1234] ^= 1

    if fleet.engine:
        fleet.engine.asked.clear()
        fleet.engine.before_sums = flip
    with pytest.raises(EngineError) as caught:
        weights.publish(2)  # verify_every=2: all is compared
    results["error"], results["type"] = str(caught.value), type(caught.value).__name__
    if fleet.engine:
        results["asked"] = list(fleet.engine.asked)
        fleet.engine.before_sums = lambda: None
    weights.publish(4)
    if fleet.engine:
        fleet.engine = Engine(session.planner)
    weights.restore()
    done = expected(policy, session.planner)
    if fleet.engine:
        results["restored"] = (fleet.engine.asked, stale(fleet.engine.weights(), done))
    shutdown()
    return results


def test_a_flipped_bit_is_named_on_every_rank_and_a_new_engine_is_attached(model_path: Path) -> None:
    config = config_of(model_path, "parallel.tensor_model_parallel_size=2", "reshard.verify_every=2")
    results = run_ranks(flipped, 2, config)
    for result in results:
        assert result["type"] == "WeightsDifferError"
        assert "engine 0" in result["error"]
        assert "visual.blocks.1.mlp.gate_up_proj.weight on rank 0;" in result["error"]
        assert "the checksums of 1 of" in result["error"]
    assert results[0]["asked"] == ["pause", "checksums"]  # and no new version: it stays paused
    assert results[0]["restored"] == (["pause", "attach", "version 4"], [])


def refused(config: Config) -> tuple[str, list[str]]:
    from megatron_mmrl.parallel.state import shutdown

    _, _, weights, fleet, _, _ = start(config)
    if fleet.engine:
        fleet.engine.parameters["surplus"] = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(EngineError) as caught:
        weights.publish(0)
    values = [] if not fleet.engine else sorted({float(p.flatten()[0]) for p in fleet.engine.parameters.values()})
    shutdown()
    return str(caught.value), values


def test_an_engine_that_does_not_fit_keeps_its_weights_and_stops_the_run(model_path: Path) -> None:
    (message, values), (other, _) = run_ranks(refused, 2, config_of(model_path, "parallel.data_parallel_size=2"))
    assert message == other
    assert "engine 0 refuses to share the trainer's memory" in message
    assert "the engine has surplus, which was not planned" in message
    assert values == [1.0, 7.0]


def test_an_engine_over_two_nodes_is_refused(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mmrl.reshard.between import planner_of

    config = load_config(
        Path(__file__).parents[2] / "configs" / "quickstart.yaml",
        [f"model.path={model_path}", "parallel.tensor_model_parallel_size=2", "rollout.tensor_parallel_size=2"],
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"engine 0 .* on nodes \[0, 1\]"):
        planner_of(config)
