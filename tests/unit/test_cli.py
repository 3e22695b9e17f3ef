"""The command line: what starts, with which arguments, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mmrl import cli
from megatron_mmrl.cluster import local
from megatron_mmrl.commands import quickstart

HF_CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "vision_config": {"num_heads": 4},
}
Started = list[tuple[str, list[str], int, Path, bool]]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration whose model and data exist; the working directory is the temporary one."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(HF_CONFIG))
    Path("train.parquet").touch()
    Path("config.yaml").write_text("model: {path: model}\ndata: {train_files: [train.parquet]}\n")
    return "config.yaml"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been started."""
    calls: Started = []

    def run_ranks(module: str, args: list[str], world_size: int, log_dir: Path, *, can_save: bool) -> int:
        calls.append((module, args, world_size, log_dir, can_save))
        return 7

    monkeypatch.setattr(local, "run_ranks", run_ranks)
    return calls


def test_train_starts_as_many_ranks_as_the_parallel_sizes_say(config: str, started: Started) -> None:
    size = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    assert cli.main(["train", size[0], "--config", config, size[1]]) == 7
    assert started == [("megatron_mmrl.train", ["--config", config, *size], 4, Path("runs/default/logs"), True)]


def test_eval_passes_the_checkpoint_on(config: str, started: Started) -> None:
    Path("test.parquet").touch()
    override = "data.eval_files=[test.parquet]"
    assert cli.main(["eval", "--config", config, "--checkpoint", "model", override]) == 7
    args = ["--config", config, "--checkpoint", "model", override]
    assert started == [("megatron_mmrl.evaluate", args, 1, Path("runs/default/logs/eval"), False)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "paralel.data_parallel_size=2",
            "unknown key paralel.data_parallel_size; did you mean parallel.data_parallel_size?",
        ),
        ("optim.lr=fast", "optim.lr='fast': expected a number"),
        (
            "parallel.tensor_model_parallel_size=3",
            "parallel.tensor_model_parallel_size=3 does not fit the model: it must divide num_attention_heads=4, "
            "intermediate_size=256 and the 128 rows of queries, keys and values, and divide or be a multiple of "
            "num_key_value_heads=2; use one of [1, 2, 4]",
        ),
        (
            "model.path=nowhere",
            "model.path=nowhere: no config.json there; name the directory of a Hugging Face checkpoint",
        ),
        ("algorithm.name=grop", "algorithm.name='grop' is not known; did you mean grpo?"),
        ("reward.terms=[{name: acuracy}]", "reward 'acuracy' is not known; did you mean accuracy?"),
        ("data.format=vrel", "data.format='vrel' is not known; did you mean verl?"),
        ("data.train_files=[]", "data.train_files is empty; name at least one file of prompts"),
        ("data.train_files=[none.parquet]", "data.train_files: none.parquet does not exist"),
        (
            "rollout.tensor_parallel_size=2",
            "rollout.tensor_parallel_size=2 exceeds the 1 trainer processes of an engine (1 / rollout.num_engines=1), "
            "each of which shares its memory with one rank of the engine; use fewer or smaller engines, or "
            "reshard.method=reference",
        ),
        (
            "run.output_dir=model",
            "run.output_dir=model holds files but no run (config.yaml is missing); use another directory",
        ),
    ],
)
def test_what_cannot_work_ends_with_2_and_starts_nothing(
    config: str, started: Started, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert cli.main(["train", "--config", config, override]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert started == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "model.path=model: config.json is not valid JSON: "),
        ("{}", "model.path=model: config.json has no vision_config; a vision-language model is needed"),
        ('{"vision_config": {}}', "model.path=model: config.json has no num_attention_heads"),
    ],
)
def test_a_model_that_is_none_is_named(
    config: str, started: Started, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    Path("model/config.json").write_text(content)
    assert cli.main(["train", "--config", config]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert started == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "mmrl: error: the following arguments are required: command"),
        (["train"], "mmrl train: error: the following arguments are required: --config"),
        (
            ["train", "--config", "f", "--run.seed=1"],
            "mmrl train: error: unrecognized argument --run.seed=1; write run.seed=1",
        ),
        (["train", "--config", "f", "--dry"], "mmrl train: error: unrecognized argument --dry"),
        (["eval", "--config", "f"], "mmrl eval: error: the following arguments are required: --checkpoint"),
    ],
)
def test_a_command_line_that_cannot_be_read_ends_with_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_eval_needs_a_checkpoint_and_prompts(config: str, started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--config", config, "--checkpoint", "model"]) == 2
    assert capsys.readouterr().err == "error: data.eval_files is empty; name at least one file of prompts\n"
    override = "data.eval_files=[train.parquet]"
    assert cli.main(["eval", "--config", config, "--checkpoint", "step_9", override]) == 2
    assert capsys.readouterr().err == "error: --checkpoint step_9 is not a directory\n"
    assert started == []


def test_a_dry_run_prints_a_configuration_that_loads_and_the_layout(
    config: str, started: Started, capsys: pytest.CaptureFixture[str]
) -> None:
    override = "parallel.pipeline_model_parallel_size=2"
    assert cli.main(["train", "--config", config, "--dry-run", override]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-3:] == [
        "# 2 ranks, 1 SGLang server(s)",
        "# rank 0: tensor 0, pipeline 0, context 0, data 0, leads engine 0",
        "# rank 1: tensor 0, pipeline 1, context 0, data 0",
    ]
    Path("resolved.yaml").write_text(printed)
    assert cli.main(["train", "--config", "resolved.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == printed
    assert started == []


def test_quickstart_prepares_once_and_then_trains_what_it_prepared(
    config: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Path] = []

    def prepare(out_dir: Path, options: object = None) -> None:
        prepared.append(out_dir)
        (out_dir / "model").mkdir()
        (out_dir / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
        for name in ("train", "test"):
            (out_dir / f"{name}.parquet").touch()

    monkeypatch.setattr("megatron_mmrl.quickstart.prepare", prepare)
    for overrides in ([], ["run.seed=1"]):
        assert cli.main(["quickstart", *overrides]) == 7
    assert len(prepared) == 1
    args = ["--config", str(quickstart.CONFIG_FILE), "run.resume=auto"]
    assert [call[1] for call in started] == [args, [*args, "run.seed=1"]]
    assert cli.main(["quickstart", "--task", "add", "run.seed=1"]) == 7
    assert started[-1][1][2:] == [
        "run.output_dir=runs/quickstart_add",
        "model.path=runs/prepared_add/model",
        "data.train_files=[runs/prepared_add/train.parquet]",
        "data.eval_files=[runs/prepared_add/test.parquet]",
        "run.resume=auto",
        "run.seed=1",
    ]


def test_an_interrupted_preparation_is_done_again(
    config: str, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(out_dir: Path, options: object = None) -> None:
        (out_dir / "train.parquet").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_mmrl.quickstart.prepare", interrupted)
    assert cli.main(["quickstart"]) == 130
    assert not quickstart.PREPARED_DIR.exists()
    assert started == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, "mmrl 0.1.0\n")
