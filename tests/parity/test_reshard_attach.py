"""A real SGLang whose parameters are memory of the test's process: equal to a normal load, changed without a call.

That an attach is accepted proves the table of engine parameters: names, shapes and types are compared both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.models.tiny import TinySizes
from megatron_mmrl.types import SamplingParams
from tests.parity.attach_case import Owner, attach, changed, engine_checksums, with_parameters
from tests.parity.engine_case import TOLERANCE, Case, make_case, start, update
from tests.unit.test_reshard_memory import users

SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=6)
MODELS = {
    # SGLang pads the vision MLP's 124 and 60 to 128 and 64.
    "1 rank, padded vision MLP": (RolloutConfig(), False, TinySizes(num_layers=2, vision_intermediate=124)),
    "2 ranks, 1 key/value head, tied": (
        RolloutConfig(tensor_parallel_size=2),
        True,
        TinySizes(num_layers=2, num_kv_heads=1, vision_intermediate=60),
    ),
    "4 ranks, 2 key/value heads": (
        RolloutConfig(tensor_parallel_size=4),
        False,
        TinySizes(num_layers=2, vision_intermediate=124),
    ),
    "2 ranks, each with the whole tower": (
        RolloutConfig(tensor_parallel_size=2, mm_enable_dp_encoder=True),
        False,
        TinySizes(num_layers=2, vision_intermediate=124),
    ),
}
QUICK = 2  # of them; the others are run by make test-full


class Engine:
    """A running engine, with what a normal load made of it."""

    def __init__(self, case: Case, log_path: Path, config: RolloutConfig) -> None:
        self.case, self.size, self._dir = case, config.tensor_parallel_size, log_path.parent
        self._whole_encoder, self._answers = config.mm_enable_dp_encoder, 0
        self.http = start(case, log_path, dataclasses.replace(config, deterministic=True, request_timeout_s=120))

    def owner(self) -> Owner:
        """New memory, all zeros."""
        return Owner(self.case, tensor=self.size, whole_encoder=self._whole_encoder)

    def answer_dir(self) -> Path:
        self._answers += 1
        path = self._dir / f"answers{self._answers}"
        path.mkdir()
        return path

    def checksums(self, names: tuple[str, ...] | None = None) -> list[dict[str, int]]:
        return engine_checksums(self.http, self.answer_dir(), size=self.size, names=names)

    def sampled(self, first: int, *, flush: bool = True) -> list[tuple[list[int], list[float]]]:
        if flush:
            self.http._admin("flushing", "/flush_cache", {})
        answers = []
        for prompt in self.case.prompts(3, first=first):  # one by one: what shares a batch can show in the last bits
            ((response,),) = self.http.generate([prompt], SAMPLING, seed=0, step=0)
            answers.append((response.ids.tolist(), response.logprobs.tolist()))
        return answers

    def difference(self, weights) -> float:
        self.http._admin("flushing", "/flush_cache", {})
        prompts = self.case.prompts(3)
        groups = self.http.generate(prompts, SAMPLING, seed=0, step=0)
        return self.case.largest_difference(weights, prompts, groups, temperature=1.0)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.full] if i >= QUICK else []) for i, name in enumerate(MODELS)],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config, tied, sizes = MODELS[request.param]
    case = make_case(tmp_path_factory.mktemp("model"), tied=tied, sizes=sizes)
    running = Engine(case, tmp_path_factory.mktemp("engine") / "engine.log", config)
    try:
        update(running.http, case.weights(), 0)
        yield running
    finally:
        running.http.close()


@pytest.fixture(scope="module")
def owner(engine: Engine) -> Owner:
    owner = engine.owner()
    owner.load(engine.case.weights())
    return owner


def test_what_is_not_as_planned_is_refused_and_changes_nothing(engine: Engine, owner: Owner) -> None:
    before, sampled = engine.checksums(), engine.sampled(0)
    empty = engine.owner()  # an engine that took its zeros would show it
    last, name = engine.size - 1, "model.layers.1.mlp.down_proj.weight"
    item = next(item for item in owner.specs(Path("/"))[last].parameters if item.name == name)
    rows, columns = item.shape
    faults = {
        f"the engine has {name}, which was not planned": lambda spec: with_parameters(
            spec, lambda items: [item for item in items if item.name != name]
        ),
        "model.layers.9.weight was planned, the engine has no such parameter": lambda spec: with_parameters(
            spec, lambda items: [*items, dataclasses.replace(items[0], name="model.layers.9.weight")]
        ),
        f"{name} was planned as float32 [{rows - 1}, {columns}]": lambda spec: changed(
            spec, name, shape=(rows - 1, columns)
        ),
        f"{name} was planned as bfloat16": lambda spec: changed(spec, name, dtype="bfloat16"),
        f"with strides [1, {rows}]": lambda spec: changed(spec, name, stride=(1, rows)),
        "does not fit into a block": lambda spec: changed(spec, name, offset=1 << 40),
        "there are 2 blocks, wanted are": lambda spec: changed(spec, name, block=2),
        "No such file or directory": lambda spec: dataclasses.replace(
            spec, blocks=tuple({**block, "descriptor": 1_000_000} for block in spec.blocks)
        ),
        f"of {engine.size} was sent what is for rank 7": lambda spec: dataclasses.replace(spec, rank=7),
    }
    for problem, fault in faults.items():
        specs = empty.specs(engine.answer_dir())
        specs[last] = fault(specs[last])  # the others are right, and must refuse as well
        answers = attach(engine.http, specs)
        assert [answer.rank for answer in answers] == list(range(engine.size))
        for answer in answers:
            assert answer.digest == ""
            assert any(f"rank {last}" in text or "block" in text for text in answer.problems), answer
            assert [text for text in answer.problems if problem in text], (problem, answer.problems)
    assert engine.checksums() == before
    assert engine.sampled(0) == sampled


def test_attached_equals_loaded_to_the_bit(engine: Engine, owner: Owner) -> None:
    update(engine.http, engine.case.weights(), 1)
    loaded, sampled = engine.checksums(), engine.sampled(0)
    specs = owner.specs(engine.answer_dir())
    answers = attach(engine.http, specs)
    assert [answer.problems for answer in answers] == [()] * engine.size
    assert [answer.digest for answer in answers] == [spec.digest for spec in specs]
    assert engine.checksums() == owner.checksums(Path("/")) == loaded
    assert engine.sampled(0) == sampled
    names = ("model.norm.weight", "visual.patch_embed.proj.weight")
    assert engine.checksums(names) == [{name: sums[name] for name in names} for sums in loaded]


def test_a_change_in_the_owner_is_the_engines_with_no_call(engine: Engine, owner: Owner) -> None:
    answers = attach(engine.http, owner.specs(engine.answer_dir()))
    assert not any(answer.problems for answer in answers)
    owner.load(engine.case.weights())
    before = engine.sampled(100)
    engine.http._admin("flushing", "/flush_cache", {})
    weights = engine.case.weights(seed=5)
    owner.load(weights)
    after = engine.sampled(100, flush=False)
    assert all(one[1] != other[1] for one, other in zip(before, after, strict=True))
    assert engine.difference(weights) <= TOLERANCE
    assert engine.difference(engine.case.weights()) > TOLERANCE
    assert engine.checksums() == owner.checksums(Path("/"))


def test_another_owner_takes_over(engine: Engine, owner: Owner) -> None:
    """As after a restart; the memory of the one before is given up."""
    attach(engine.http, owner.specs(engine.answer_dir()))
    inodes = [block.handle["inode"] for pair in owner.blocks for block in pair]
    readers = {process for inode in inodes for process in users(inode)}
    assert len(readers) == 1 + engine.size  # this process, and each rank of the engine
    other, weights = engine.owner(), engine.case.weights(seed=6)
    other.load(weights)
    assert not any(answer.problems for answer in attach(engine.http, other.specs(engine.answer_dir())))
    assert engine.difference(weights) <= TOLERANCE
    assert len({process for inode in inodes for process in users(inode)}) == 1


def test_a_message_that_is_none_leaves_the_engine_alive(engine: Engine, owner: Owner) -> None:
    owner.load(engine.case.weights())
    attach(engine.http, owner.specs(engine.answer_dir()))
    before = engine.checksums()
    specs = owner.specs(engine.answer_dir())

    class Garbage:
        answer_dir = specs[0].answer_dir

        def to_json(self) -> str:
            return "{"

    with pytest.raises(FileNotFoundError):  # the rank does not even know where to answer
        attach(engine.http, [*specs[:-1], Garbage()])
    assert engine.checksums() == before
    (missing, *_) = engine_checksums(engine.http, engine.answer_dir(), size=engine.size, names=("no.such.weight",))
    assert missing == {}
