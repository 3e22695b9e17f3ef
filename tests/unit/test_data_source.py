"""A source gives good prompts only, sets bad rows aside, resumes exactly, and is the same on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import numpy as np
import pytest

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.errors import TooManyBadRowsError
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.data.source import PromptSource, prompt_source
from megatron_mmrl.models.tiny import make_tiny_checkpoint
from megatron_mmrl.types import EncodedPrompt, Prompt
from tests.unit.data_rows import bomb, encoded, picture, row, write

T = TypeVar("T")
BAD = {
    1: "zero bytes",
    3: "cannot be decoded",
    5: "image claims",
    7: "no answer",
    9: "outside data.image_root",
    11: "outside data.image_root",
    13: "special token",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(out, texts=["Which digit?"])
    return str(out)


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"max_decoded_pixels": 1_000_000, "max_prompt_tokens": 60, "max_bad_fraction": 0.5, **changes})


def good_rows(count: int) -> list[dict[str, Any]]:
    return [row(images=[{"bytes": encoded(picture(seed=number))}], answer=str(number)) for number in range(count)]


@pytest.fixture
def spoiled(tmp_path: Path) -> str:
    """Twenty rows of which every bad one is bad in its own way, and row 15 is too long."""
    root = tmp_path / "images"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(picture()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    rows = good_rows(20)
    rows[1] = row(images=[{"bytes": b""}])
    rows[3] = row(images=[{"bytes": encoded(picture())[:-500]}])
    rows[5] = row(images=[{"bytes": bomb(5000, 5000)}])
    rows[7] = row(answer=None)
    rows[9] = row(images=[{"path": "../secret.png"}])
    rows[11] = row(images=[{"path": "link.png"}])
    rows[13] = row("<image>Which <|image_pad|>?")
    rows[15] = row("<image>" + "Which digit? " * 40)
    return write(tmp_path / "train.parquet", rows)


def open_source(file: str, model: str, tmp_path: Path, **changes: Any) -> PromptSource:
    given = {key: changes.pop(key) for key in ("keep", "exchange", "seed") if key in changes}
    settings = config(image_root=str(tmp_path / "images"), **changes)
    return prompt_source(
        [file],
        settings,
        Processor(model, settings),
        **{"seed": 0, "quarantine_path": tmp_path / "quarantine.jsonl", **given},
    )


def answers(encoded_prompts: list[EncodedPrompt]) -> list[str]:
    return [item.prompt.answer for item in encoded_prompts]


GOOD = [str(number) for number in range(20) if number not in BAD and number != 15]


def test_every_bad_row_is_named_and_the_rest_goes_on(spoiled: str, model: str, tmp_path: Path) -> None:
    source = open_source(spoiled, model, tmp_path)
    assert sorted(answers(source.next(len(GOOD))), key=int) == GOOD
    source.next(2 * len(GOOD))  # later epochs pass over bad rows without a word
    listed = {
        (entry["file"], entry["row"]): entry["reason"]
        for entry in map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    }
    assert sorted(listed) == [("train.parquet", number) for number in BAD]
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == len(BAD)
    for number, reason in BAD.items():
        assert reason in listed["train.parquet", number]
    assert "more than data.max_prompt_tokens=60" in source.refused["train.parquet:15"].reason
    assert source.counters() == {
        "data/epoch": 3.0, "data/bad_rows": 7.0, "data/too_long": 1.0, "data/dropped": 0.0,
    }  # fmt: skip


def test_beyond_the_limit_the_run_stops_with_a_count(spoiled: str, model: str, tmp_path: Path) -> None:
    source = open_source(spoiled, model, tmp_path, max_bad_fraction=0.3, shuffle=False)  # 6 of 20
    assert answers(source.next(7)) == GOOD[:7]  # rows 0 .. 12, six of them bad
    with pytest.raises(TooManyBadRowsError, match=r"7 of 20 rows are bad, more than the 6 .* train.parquet row 1:"):
        source.next(1)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 7


def test_evaluation_reads_every_good_row_in_order_and_leaves_the_stream_alone(
    spoiled: str, model: str, tmp_path: Path
) -> None:
    source = open_source(spoiled, model, tmp_path)
    assert answers(source.all()) == GOOD
    assert answers(source.all(limit=3)) == GOOD[:3]
    assert source.num_prompts == 20
    assert answers(source.next(5)) == answers(open_source(spoiled, model, tmp_path).next(5))


def test_rows_without_a_use_are_dropped_and_counted_but_are_not_bad(model: str, tmp_path: Path) -> None:
    asked: list[str] = []

    def keep(prompt: Prompt) -> str | None:
        asked.append(prompt.id)
        return "odd" if int(prompt.answer) % 2 else None

    file = write(tmp_path / "train.parquet", good_rows(6))
    source = open_source(file, model, tmp_path, keep=keep, max_bad_fraction=0.0)
    assert sorted(answers(source.next(9))) == sorted(["0", "2", "4"] * 3)
    assert sorted(asked) == [f"train.parquet:{number}" for number in range(6)]  # once each, in three epochs
    assert source.counters()["data/dropped"] == 3
    assert source.refused["train.parquet:1"].reason == "odd"
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_when_nothing_can_be_used_the_run_stops(model: str, tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", good_rows(3))
    source = open_source(file, model, tmp_path, keep=lambda prompt: "no")
    with pytest.raises(ValueError, match=r"none of the 3 prompts can be used: 3 dropped; the first is .*: no"):
        source.next(1)


@pytest.mark.parametrize("done", [0, 4, 13, 30])
def test_a_resumed_source_equals_an_unbroken_one(spoiled: str, model: str, tmp_path: Path, done: int) -> None:
    unbroken, first = (open_source(spoiled, model, tmp_path) for _ in range(2))
    unbroken.next(done)
    first.next(done)
    lines = (tmp_path / "quarantine.jsonl").read_text() if done else ""
    state = json.loads(json.dumps(first.state_dict()))
    resumed = open_source(spoiled, model, tmp_path)
    resumed.load_state_dict(state)
    assert resumed.counters() == first.counters()
    for ours, theirs in zip(resumed.next(20), unbroken.next(20), strict=True):
        assert ours.prompt.id == theirs.prompt.id
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.pixel_values, theirs.pixel_values)
    assert resumed.state_dict() == unbroken.state_dict()
    listed = (tmp_path / "quarantine.jsonl").read_text()
    assert listed.startswith(lines)
    assert len(listed.splitlines()) == len(set(listed.splitlines())) == len(BAD)


def test_resuming_on_other_data_is_refused(spoiled: str, model: str, tmp_path: Path) -> None:
    state = open_source(spoiled, model, tmp_path).state_dict()
    other = open_source(write(tmp_path / "other.parquet", good_rows(20)), model, tmp_path)
    with pytest.raises(ValueError, match="fingerprint"):
        other.load_state_dict(state)


class Ranks:
    """Threads as ranks: what every rank passes to ``all_gather`` comes back to all of them."""

    def __init__(self, world_size: int) -> None:
        self.slots: list[Any] = [None] * world_size
        self.barrier = Barrier(world_size, timeout=30)

    def run(self, work: Callable[[Rank], T]) -> list[T]:
        ranks = [Rank(self, rank) for rank in range(len(self.slots))]
        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(work, ranks))


class Rank:
    """One of them."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.world_size, self._ranks = rank, len(ranks.slots), ranks

    def all_gather(self, value: Any) -> list[Any]:
        self._ranks.slots[self.rank] = value
        self._ranks.barrier.wait()
        gathered = list(self._ranks.slots)
        self._ranks.barrier.wait()
        return gathered


def counting(processor: Processor) -> tuple[Processor, list[bytes]]:
    seen: list[bytes] = []
    process = processor.images.process
    processor.images.process = lambda data: seen.append(data) or process(data)  # type: ignore[method-assign]
    return processor, seen


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_images_and_agree_on_everything(
    spoiled: str, model: str, tmp_path: Path, world_size: int
) -> None:
    settings = config(image_root=str(tmp_path / "images"))
    processors = [counting(Processor(model, settings)) for _ in range(world_size)]

    def work(rank: Rank) -> tuple[list[EncodedPrompt], dict[str, Any]]:
        source = prompt_source(
            [spoiled],
            settings,
            processors[rank.rank][0],
            seed=0,
            quarantine_path=tmp_path / f"rank{rank.rank}.jsonl",
            exchange=rank,
            keep=lambda prompt: "zero" if prompt.answer == "0" else None,
        )
        return source.next(30), source.state_dict()

    results = Ranks(world_size).run(work)
    alone = open_source(spoiled, model, tmp_path, keep=lambda prompt: "zero" if prompt.answer == "0" else None)
    expected = alone.next(30)
    for prompts, state in results:
        for ours, theirs in zip(prompts, expected, strict=True):
            assert ours.prompt.id == theirs.prompt.id
            assert np.array_equal(ours.ids, theirs.ids)
            assert np.array_equal(ours.pixel_values, theirs.pixel_values)
        assert json.loads(json.dumps(state)) == json.loads(json.dumps(alone.state_dict()))
    assert [path.name for path in sorted(tmp_path.glob("rank*.jsonl"))] == ["rank0.jsonl"]
    work_done = [len(seen) for _, seen in processors]
    everything = [data for _, seen in processors for data in seen]
    assert len(everything) == len(set(everything))  # once per distinct image, over all ranks
    assert max(work_done) - min(work_done) <= len(everything) // 2


def test_a_row_that_one_rank_cannot_read_is_left_out_on_all(model: str, tmp_path: Path) -> None:
    """Two nodes whose image directories differ by one file."""
    rows = [row(images=[{"path": f"{number}.png"}], answer=str(number)) for number in range(4)]
    file = write(tmp_path / "train.parquet", rows)
    for rank in range(2):
        (tmp_path / f"images{rank}").mkdir()
        for number in range(4):
            (tmp_path / f"images{rank}/{number}.png").write_bytes(encoded(picture(seed=number)))
    (tmp_path / "images1/2.png").unlink()

    def work(rank: Rank) -> list[str]:
        settings = config(image_root=str(tmp_path / f"images{rank.rank}"))
        source = prompt_source(
            [file],
            settings,
            Processor(model, settings),
            seed=0,
            quarantine_path=tmp_path / "quarantine.jsonl",
            exchange=rank,
        )
        return answers(source.next(6))

    first, second = Ranks(2).run(work)
    assert first == second
    assert set(first) == {"0", "1", "3"}
    assert json.loads((tmp_path / "quarantine.jsonl").read_text())["row"] == 2
