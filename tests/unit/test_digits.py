"""The digits task: veRL rows whose answers are right and whose scans are either trained on or tested on."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.dataset import PromptDataset
from megatron_mmrl.data.digits import DigitsOptions, write_digits
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.quickstart import prepare

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "prepare.py"


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def scans(path: Path) -> list[int]:
    return [scan for row in rows(path) for scan in row["extra_info"]["scans"]]


@pytest.mark.parametrize("task", ["read", "add", "both"])
def test_no_scan_is_in_both_files_whatever_the_seed(tmp_path: Path, task: str) -> None:
    trained, tested = set(), set()
    for seed in range(2):
        write_digits(tmp_path, DigitsOptions(task=task, train_rows=1500, test_rows=400, seed=seed))  # type: ignore[arg-type]
        trained |= set(scans(tmp_path / "train.parquet"))
        tested |= set(scans(tmp_path / "test.parquet"))
    assert trained.isdisjoint(tested)
    assert (len(trained), len(tested)) == (1400, 397)  # every scan is used


def test_no_image_is_in_both_files_either(tmp_path: Path) -> None:
    """The same pixels under two numbers would be in both, were the data set to hold them."""
    write_digits(tmp_path, DigitsOptions(train_rows=1400, test_rows=397))
    images = [{row["images"][0]["bytes"] for row in rows(tmp_path / f"{split}.parquet")} for split in ("train", "test")]
    assert images[0].isdisjoint(images[1])


def test_answers_and_solutions_are_those_of_the_scans(tmp_path: Path) -> None:
    write_digits(tmp_path, DigitsOptions(task="both", train_rows=40, test_rows=10))
    labels = load_digits().target
    for number, row in enumerate(rows(tmp_path / "train.parquet")):
        digits = [labels[scan] for scan in row["extra_info"]["scans"]]
        total, thought = sum(digits), "+".join(map(str, digits))
        assert len(digits) == len(row["images"]) == 1 + number % 2
        assert row["data_source"] == ("digits/read", "digits/add")[number % 2]
        assert row["reward_model"] == {"style": "rule", "ground_truth": str(total)}
        tagged, bare = (f"<think>{thought}</think>{answer}" for answer in (f"<answer>{total}</answer>", total))
        assert row["extra_info"]["solution"] in (tagged, bare)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.65, 0.6, 0.7), (1.0, 1, 1)])
def test_the_asked_share_of_solutions_has_no_tags_around_the_answer(
    tmp_path: Path, share: float, low: float, high: float
) -> None:
    write_digits(tmp_path, DigitsOptions(train_rows=1000, test_rows=5, untagged_share=share))
    solutions = [row["extra_info"]["solution"] for row in rows(tmp_path / "train.parquet")]
    assert low <= sum("<answer>" not in solution for solution in solutions) / 1000 <= high


def test_images_are_the_scans_enlarged(tmp_path: Path) -> None:
    write_digits(tmp_path, DigitsOptions(train_rows=5, test_rows=5))
    originals = load_digits().images
    for row in rows(tmp_path / "test.parquet"):
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        assert (image.format, image.size) == ("PNG", (56, 56))
        shrunk = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float64) * 16 / 255
        scan = originals[row["extra_info"]["scans"][0]]
        assert np.corrcoef(shrunk.ravel(), scan.ravel())[0, 1] > 0.95


def test_same_seed_same_rows_other_seed_other_rows(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_digits(tmp_path / name, DigitsOptions(train_rows=50, test_rows=50, seed=seed))
    assert rows(tmp_path / "a/train.parquet") == rows(tmp_path / "b/train.parquet")
    for split in ("train", "test"):
        assert scans(tmp_path / f"a/{split}.parquet") != scans(tmp_path / f"c/{split}.parquet")


@pytest.mark.parametrize("wrong", [{"task": "subtract"}, {"train_rows": 0}, {"test_rows": 0}, {"untagged_share": 1.1}])
def test_options_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DigitsOptions(**wrong)


def test_prepared_questions_are_short_and_the_targets_one_token_a_word(tmp_path: Path) -> None:
    prepare(tmp_path, DigitsOptions(task="both", train_rows=4, test_rows=2, untagged_share=0))
    config = DataConfig(train_files=[str(tmp_path / "train.parquet")])
    processor = Processor(str(tmp_path / "model"), config)
    dataset = PromptDataset(config.train_files, config)
    read, add = (processor.encode(dataset.prompt(row)) for row in (0, 1))
    assert (len(read.ids), len(add.ids)) == (24, 30)
    assert (len(read.images), len(add.images)) == (1, 2)
    assert len(processor.encode_text(read.prompt.meta["solution"])) == 7  # two pairs of tags, two digits, the end
    assert "<think>" in processor.decode(processor.encode_text(add.prompt.meta["solution"]))


def test_script_writes_data_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--out", str(tmp_path), "--task", "add", "--train-rows", "3", "--test-rows", "2", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert len(rows(tmp_path / "train.parquet")) == 3
    assert len(rows(tmp_path / "test.parquet")[0]["images"]) == 2
    assert (tmp_path / "model/model.safetensors").exists()
