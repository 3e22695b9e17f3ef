"""What is in data files, and every kind of thing that can be wrong with a row, found and named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_mmrl import cli
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.check import Report, Spread, check
from megatron_mmrl.models.tiny import make_tiny_checkpoint
from megatron_mmrl.types import Prompt
from tests.unit.data_rows import bomb, encoded, picture, row, write

QUESTIONS = ("Which digit?", "2 + 2?")


def image(seed: int, width: int = 56, height: int = 56) -> list[dict[str, Any]]:
    return [{"bytes": encoded(picture(width, height, seed=seed))}]


def good_rows() -> list[dict[str, Any]]:
    return [
        row("<image>Which digit?", image(1)),
        row("<image>Which digit?", image(2, 300, 100), answer="8"),
        row("2 + 2?", [], answer="4"),
    ]


def bad_rows() -> list[dict[str, Any]]:
    return [
        row("<image>which  DIGIT?", image(1), answer="9"),  # the first again, with another answer
        row(answer=None),
        row(images=[{"bytes": bomb(5000, 4000)}]),
        row(images=[{"path": "../secret.png"}]),
        row("<image>Long?" + " x" * 300, image(3)),
        row("<image>Which?", image(4), answer="\\frac{"),
        row("<image>Which <|image_pad|>?", image(5)),
        row("<image>Which line?", image(6, 402, 2)),
    ]


def look(file: str, **changes: Any) -> Report:
    config = DataConfig(image_root=str(Path(file).parent), max_prompt_tokens=200, max_decoded_pixels=10**6)
    return check([file], config, **{"count_tokens": count, "parsable": parsable, "jobs": 1, **changes})


def parsable(prompts: Sequence[Prompt]) -> list[bool]:
    return [prompt.answer != "\\frac{" for prompt in prompts]


def count(prompt: Prompt, sizes: Any) -> int:
    assert prompt.images == ()
    return sum(len(message.text.split()) for message in prompt.messages) + 100 * len(sizes)


def test_what_good_files_hold(tmp_path: Path) -> None:
    report = look(write(tmp_path / "good.parquet", good_rows()))
    assert (report.rows, report.images, report.sources, report.findings) == (3, 2, {"test": 3}, ())
    assert report.width_pixels == Spread(min=56, mean=178, p50=178, p95=pytest.approx(287.8), max=300)
    assert report.height_pixels is not None
    assert report.height_pixels.max == 100
    assert report.image_tokens == Spread(min=4, mean=24, p50=24, p95=pytest.approx(42), max=44)  # 2 x 2, 11 x 4
    assert report.prompt_tokens is not None
    assert (report.prompt_tokens.min, report.prompt_tokens.max) == (3, 102)
    assert look(write(tmp_path / "one.parquet", good_rows()[2:])).image_tokens is None


def test_pixel_limits_change_the_tokens(tmp_path: Path) -> None:
    file = write(tmp_path / "good.parquet", good_rows()[1:2])
    config = DataConfig(min_pixels=784, max_pixels=28 * 28 * 12)
    report = check([file], config, count_tokens=None, parsable=lambda prompts: [True] * len(prompts), jobs=1)
    assert report.image_tokens == Spread(min=12, mean=12, p50=12, p95=12, max=12)
    assert report.prompt_tokens is None


def test_everything_wrong_is_found_and_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(picture()))
    file = write(tmp_path / "data/bad.parquet", [*good_rows(), *bad_rows()])

    def counted(prompt: Prompt, sizes: Any) -> int:
        return count(prompt, sizes)

    report = look(file, count_tokens=counted)
    found = {finding.id: (finding.kind, finding.reason) for finding in report.findings}
    expected = {
        3: ("duplicate", "as bad.parquet:0, but the answer '9' is '7' there"),
        4: ("bad_row", "no answer"),
        5: ("bad_image", "5000 x 4000"),
        6: ("bad_row", "leads outside"),
        7: ("too_long", "401 tokens, more than data.max_prompt_tokens=200"),
        8: ("unparsable_answer", "'\\\\frac{' cannot be parsed"),
        10: ("bad_image", "aspect ratio"),
    }
    assert set(found) == {f"bad.parquet:{number}" for number in expected}
    for number, (kind, reason) in expected.items():
        assert found[f"bad.parquet:{number}"][0] == kind
        assert reason in found[f"bad.parquet:{number}"][1]
    assert report.rows == 11
    assert report.counts["bad_row"] == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(out, texts=list(QUESTIONS))
    return out


def test_the_command_counts_as_a_run_would(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.parquet", good_rows())
    assert cli.main(["data", "check", good, "--model", str(model), "--jobs", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("rows 3, images 2 (test 3)")
    assert said.endswith("nothing is wrong\n")
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {{path: {model}}}\ndata: {{max_prompt_tokens: 60, image_root: {tmp_path}}}\n"
        "reward: {terms: [{name: accuracy}]}\n"
    )
    bad = write(tmp_path / "bad.parquet", [*good_rows(), *bad_rows()])
    assert cli.main(["data", "check", bad, "--config", str(settings), "--json", "--jobs", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 11
    kinds = {finding["id"].partition(":")[2]: finding["kind"] for finding in report["findings"]}
    assert kinds["9"] == "bad_prompt"  # the tokenizer knows that the text holds a special token
    assert (kinds["7"], kinds["3"], kinds["10"]) == ("too_long", "duplicate", "bad_image")
    assert report["counts"]["bad_row"] == 2


def test_a_command_that_cannot_work_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(tmp_path / "none.parquet")]) == 1
    assert "none.parquet does not exist" in capsys.readouterr().err
    good = write(tmp_path / "good.parquet", good_rows())
    assert cli.main(["data", "check", good, "--format", "vrl", "--jobs", "1"]) == 1
    assert "format" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert cli.main(["data", "check", str(tmp_path / "empty.jsonl"), "--jobs", "1"]) == 1
    assert "have no rows" in capsys.readouterr().err
    assert cli.main(["data", "check", good, "--jobs", "0"]) == 1
    assert "jobs=0" in capsys.readouterr().err
    assert cli.main(["data", "check", good, "--format", "swift", "--jobs", "1"]) == 1
    assert "no row can be read; is --format right?\n3 bad_row" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(f"model: {{path: {tmp_path / 'models/none'}}}\n")
    assert cli.main(["data", "check", good, "--config", str(tmp_path / "run.yaml"), "--jobs", "1"]) == 2
    assert "models/none: no config.json there" in capsys.readouterr().err  # and nothing is asked of a network


def test_pictures_lie_beside_the_first_file_unless_configured(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    file = write(tmp_path / "paths.parquet", [row(images=[{"path": "a.png"}])])
    assert cli.main(["data", "check", file, "--jobs", "1"]) == 0
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: {{path: {model}}}\n")
    capsys.readouterr()
    assert cli.main(["data", "check", file, "--config", str(settings), "--jobs", "1"]) == 1
    assert "data.image_root is not set" in capsys.readouterr().out


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(write(tmp_path / folder / "train.parquet", good_rows()[:1]))
    report = check(files, DataConfig(), count_tokens=None, parsable=parsable, jobs=1)
    (finding,) = report.findings
    assert (finding.id, finding.kind) == (f"{files[1]}:0", "duplicate")
    assert f"as {files[0]}:0" in finding.reason
