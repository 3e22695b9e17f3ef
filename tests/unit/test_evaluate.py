"""``mmrl eval`` without an engine: what is refused, what a rank is told, groups, the table and the answers' file."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl import cli
from megatron_mmrl.cluster import local
from megatron_mmrl.commands.evaluate import add_arguments
from megatron_mmrl.config import ConfigError
from megatron_mmrl.evaluate import correctness_term, groups_of
from megatron_mmrl.metrics.evaluation import AnswersFile, columns_of_none, print_table
from megatron_mmrl.metrics.pass_at_k import Tally, report
from megatron_mmrl.types import EncodedPrompt, Group, Message, Prompt, Response, Score
from tests.unit.test_cli import HF_CONFIG

PROMPT = Prompt(
    id="set.parquet:3",
    source="mathvista",
    messages=(Message(role="system", text="Think."), Message(role="user", text="What is 2 + 2?")),
    images=(),
    answer="4",
    meta={"subject": "sums", "level": 2, "metadata": {"skills": ["counting", "adding"], "grade": "1"}, "none": None},
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(HF_CONFIG))
    Path("a.parquet").touch()
    Path("b.parquet").touch()
    Path("test.jsonl").touch()
    Path("config.yaml").write_text("model: {path: model}\ndata: {eval_files: [none.parquet]}\n")
    return ["eval", "--config", "config.yaml", "--checkpoint", "model"]


def test_a_rank_is_told_what_was_given(config: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(local, "run_ranks", lambda _module, words, *_, **_options: told.append(words) or 0)
    given = "--data a.parquet --data b.parquet --samples 4 --temperature 0.6 --top-p 0.9 --by subject --by level"
    more = "--pass-k 2 --pass-k 4 --json r.json --output o.jsonl --correct format --benchmark run.seed=3"
    words = [*config, *given.split(), *more.split()]
    assert cli.main(words) == 0
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert vars(parser.parse_args(told[0])) == vars(parser.parse_args(words[1:]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--samples 0", "--samples 0: must be at least 1"),
        ("--samples 8", "--samples 8 needs --temperature above 0, such as 0.6: greedy answers are all the same"),
        ("--temperature -1", "--temperature -1.0: must be at least 0"),
        ("--top-p 0", "--top-p 0.0: must lie above 0 and not above 1"),
        ("--top-k 0", "--top-k 0: must be at least 1, or -1 for all"),
        ("--samples 4 --temperature 1 --pass-k 8", "--pass-k 8 cannot be estimated from --samples 4 answers"),
        ("--json no/r.json", "no/r.json: no is not a directory"),
        ("--checkpoint nowhere", "--checkpoint nowhere is not a directory"),
        (
            "--checkpoint .",
            "--checkpoint . is neither a step of a run, as RUN/checkpoints/step_N (state.json is missing) nor a "
            "Hugging Face or converted Megatron checkpoint, as RUN/hf (config.json is missing)",
        ),
        ("--json model", "model is a directory; name a file in it"),
        ("--data none.parquet", "data.eval_files: none.parquet does not exist"),
        (
            "--data test.jsonl data.format=math500",
            "data.eval_files: test.jsonl is .jsonl where parquet is needed; write it with mmrl data prepare test.jsonl "
            "--format math500 --output-dir D (--test-split 0: nothing is held out), and name D/train.parquet with "
            "data.format=verl",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_rank_starts(
    config: list[str], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert cli.main([*config, "--data", "a.parquet", *words.split()]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_columns_of_a_prompt() -> None:
    assert groups_of(
        PROMPT, ("subject", "level", "metadata.skills", "metadata.grade", "none", "metadata.x", "y.z")
    ) == {
        "data_source": ("mathvista",),
        "subject": ("sums",),
        "level": ("2",),
        "metadata.skills": ("counting", "adding"),
        "metadata.grade": ("1",),
        "none": (),
        "metadata.x": (),
        "y.z": (),
    }


def test_the_term_that_says_what_is_right() -> None:
    assert correctness_term(["format", "accuracy"], None) == "accuracy"
    assert correctness_term(["boxed"], None) == "boxed"
    assert correctness_term(["a", "b"], "b") == "b"
    with pytest.raises(
        ConfigError, match=r"none of reward.terms \(a\) is benchmark or accuracy or boxed; use --correct TERM"
    ):
        correctness_term(["a"], None)
    with pytest.raises(ConfigError, match=r"none of reward.terms \(a\) is b"):
        correctness_term(["a"], "b")


def test_table_in_percent() -> None:
    rows = report(
        [Tally(num_samples=4, num_correct=c, columns={"subject": (s,)}) for c, s in ((4, "[x]"), (0, "[x]"), (2, "y"))],
        (2,),
        ("subject",),
    )
    stream = io.StringIO()
    title = "runs/[hf]: a name that is longer than the table is wide, which is no reason to break it in two, or three"
    print_table(title, rows, stream)
    assert stream.getvalue().splitlines()[0] == title
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stream.getvalue().splitlines() if "│" in line]
    assert lines == [
        ["all", "3", "50.00 ± 28.87", "61.11 ± 30.93"],
        ["subject: [x]", "2", "50.00 ± 50.00", "50.00 ± 50.00"],
        ["subject: y", "1", "50.00", "83.33"],
    ]
    assert "pass@1[4]" in stream.getvalue()


def test_a_column_that_no_question_has_is_named() -> None:
    tallies = [
        Tally(num_samples=1, num_correct=1, columns={"subject": ("x",), "level": level}) for level in ((), ("1",))
    ]
    assert columns_of_none(report(tallies, (), ("subject", "level", "sbject"))) == ["sbject"]


def scored() -> Group:
    response = Response(
        ids=np.arange(3), logprobs=np.zeros(3, np.float32), finish="stop", policy_version=0, text="<answer>4</answer>"
    )
    encoded = EncodedPrompt(
        prompt=PROMPT,
        ids=np.arange(4),
        engine_ids=np.arange(4),
        images=(),
        pixel_values=np.zeros((0, 1176), np.float32),
        image_grid_thw=np.zeros((0, 3), np.int64),
    )
    scores = (Score(total=1.0, terms={"accuracy": 1.0}), Score(total=0.0, terms={"accuracy": 0.0}, error="late"))
    return Group(prompt=encoded, responses=(response, replace(response, text="5")), scores=scores)


def test_answers_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswersFile(path) as file:
        file.write(scored(), [True, False], {"data_source": ("mathvista",), "subject": ("sums",)})
        assert not path.exists()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {
        "prompt_id": "set.parquet:3",
        "data_source": "mathvista",
        "subject": ["sums"],
        "sample": 0,
        "question": "What is 2 + 2?",
        "text": "<answer>4</answer>",
        "answer": "4",
        "correct": True,
        "terms": {"accuracy": 1.0},
        "error": None,
        "length": 3,
        "finish": "stop",
    }
    assert (second["sample"], second["correct"], second["error"]) == (1, False, "late")

    def interrupted() -> None:
        with AnswersFile(tmp_path / "other.jsonl") as file:
            file.write(scored(), [True, False], {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers.jsonl"]
