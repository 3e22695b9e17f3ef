"""Configuration: what is accepted, and the exact words with which the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mmrl.config import Config, ConfigError, dump_config, load_config
from megatron_mmrl.config.build import known_keys

MODEL = "model: {path: m}\n"
SECTIONS = "model, run, parallel, data, rollout, reshard, reward, algorithm, optim, trainer, supervised, cluster"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model.path is not set; give it in the file or as model.path=..."),
        ("model: m", "model='m': expected keys below it, such as model.path"),
        # unknown keys: a typo in the section, in the key, in a list; the right key in the wrong place; nothing near
        (
            MODEL + "paralel: {tensor_model_parallel_size: 2}",
            "unknown key paralel.tensor_model_parallel_size; did you mean parallel.tensor_model_parallel_size?",
        ),
        (
            MODEL + "rollout: {sample_per_promt: 2}",
            "unknown key rollout.sample_per_promt; did you mean rollout.samples_per_prompt?",
        ),
        (
            MODEL + "reward: {terms: [{name: format, wieght: 1}]}",
            "unknown key reward.terms[0].wieght; did you mean reward.terms[0].weight?",
        ),
        (
            MODEL + "supervised: {optim: {learning_rate: 1}}",
            "unknown key supervised.optim.learning_rate; supervised.optim has lr, min_lr, schedule, warmup_updates, "
            "warmup_fraction, weight_decay, beta1, beta2, eps, clip_grad, lr_scale",
        ),
        (
            MODEL + "rollout: {micro_batch_token: 8}",
            "unknown key rollout.micro_batch_token; did you mean trainer.micro_batch_tokens?",
        ),
        (MODEL + "num_steps: 3", "unknown key num_steps; did you mean run.num_steps?"),
        (MODEL + "xyzzy: 3", f"unknown key xyzzy; the top level has {SECTIONS}"),
        # types
        (MODEL + "optim: {lr: fast}", "optim.lr='fast': expected a number"),
        (MODEL + "optim: {lr: null}", "optim.lr=null: expected a number"),
        (MODEL + "optim: {lr: true}", "optim.lr=true: expected a number"),
        (MODEL + "run: {seed: 1.5}", "run.seed=1.5: expected an integer"),
        (MODEL + "run: {seed: false}", "run.seed=false: expected an integer"),
        (MODEL + "model: m", None),
        (MODEL + "parallel: {sequence_parallel: 1}", "parallel.sequence_parallel=1: expected true or false"),
        ("model: {path: m, dtype: fp16}", "model.dtype='fp16': expected one of float32, bfloat16"),
        (MODEL + "data: {train_files: a.parquet}", "data.train_files='a.parquet': expected a list"),
        (MODEL + "data: {train_files: [a, [b]]}", "data.train_files[1]=['b']: expected text"),
        (
            MODEL + "reward: {terms: [{weight: 1}]}",
            "reward.terms[0].name is not set; give it in the file or as reward.terms[0].name=...",
        ),
        (MODEL + "reward: {terms: [{name: a}, {name: b, weight: x}]}", "reward.terms[1].weight='x': expected a number"),
        (MODEL + "reward: {terms: [{name: a, kwargs: 3}]}", "reward.terms[0].kwargs=3: expected keys and values"),
        # ranges
        (MODEL + "optim: {lr: -1}", "optim.lr=-1.0: must be above 0"),
        (MODEL + "supervised: {optim: {lr: 0}}", "supervised.optim.lr=0.0: must be above 0"),
        (MODEL + "optim: {lr: .nan}", "optim.lr=nan: must be above 0"),
        (MODEL + "rollout: {samples_per_prompt: 0}", "rollout.samples_per_prompt=0: must be at least 1"),
        (
            MODEL + "rollout: {num_engines: 2}",
            "rollout.num_engines=2 does not divide the 1 trainer processes (product of the parallel sizes); "
            "use one of [1]",
        ),
        (MODEL + "reshard: {verify_every: 0}", "reshard.verify_every=0: must be at least 1"),
        (
            MODEL + "trainer: {micro_batch_tokens: 100}",
            "trainer.micro_batch_tokens=100 cannot hold one sequence of up to 2112 tokens "
            "(data.max_prompt_tokens=2048 + rollout.max_response_tokens=64)",
        ),
        # not a configuration at all
        ("- 1\n- 2", "config file {file} must hold keys and values, not a list"),
        ("model: {path: ${nowhere}}", None),
        (MODEL + "data: {system_prompt: '${nowhere}'}", "data.system_prompt: Interpolation key 'nowhere' not found"),
    ],
)
def test_what_is_refused_and_how(tmp_path: Path, text: str, message: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    if message is not None:
        assert str(error.value) == message.replace("{file}", str(tmp_path / "config.yaml"))
    else:
        assert "config.yaml is not valid YAML" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed", "override 'run.seed' is not of the form key=value"),
        ("=1", "override '=1' is not of the form key=value"),
        ("run..seed=1", "override 'run..seed=1' is not of the form key=value"),
        ("run.seed=[1", "override 'run.seed=[1': the value is not valid YAML"),
        ("run.sed=1", "unknown key run.sed; did you mean run.seed?"),
        ("run=1", "run=1: expected keys below it, such as run.output_dir"),
        (
            "reward.terms[2].weight=1",
            "override 'reward.terms[2].weight=1': the config file has a list of 1 there, no item 2",
        ),
    ],
)
def test_which_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MODEL + "reward: {terms: [{name: format}]}", override)
    assert str(error.value) == message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config file .*/none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    text = MODEL + "run: {seed: 1, num_steps: 5}\nreward: {terms: [{name: a}, {name: b}]}"
    config = load(
        tmp_path,
        text,
        "run.seed=2",
        "run.seed=3",
        "run.num_steps=null",
        "optim.lr=1e-3",
        "data.train_files=[a.parquet,b.parquet]",
        "reward.terms[1].weight=0.5",
        "model.path=runs/${run.seed}",
        "run.output_dir=a=b",
    )
    assert (config.run.seed, config.run.num_steps, config.optim.lr) == (3, None, 1e-3)
    assert config.data.train_files == ["a.parquet", "b.parquet"]
    assert [term.weight for term in config.reward.terms] == [1.0, 0.5]
    assert (config.model.path, config.run.output_dir) == ("runs/3", "a=b")


def test_numbers_may_be_written_in_the_way_that_reads_best(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL + "data: {max_decoded_pixels: 4e7}\noptim: {lr: 1}\nrun: {wandb_project: 2024}")
    assert config.data.max_decoded_pixels == 40_000_000
    assert isinstance(config.data.max_decoded_pixels, int)
    assert (config.optim.lr, config.run.wandb_project) == (1.0, "2024")


def test_what_is_dumped_loads_as_the_same_configuration(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MODEL + "reward: {terms: [{name: a, kwargs: {x: [1, {y: z}]}}]}\nsupervised: {optim: {lr: 0.5}}",
        "parallel.tensor_model_parallel_size=2",
        "data.system_prompt='yes: \"no\" # 3'",
        "run.num_steps=7",
    )
    assert load(tmp_path, dump_config(config)) == config


def test_every_known_key_can_be_set_to_its_own_default(tmp_path: Path) -> None:
    config = load(tmp_path, MODEL)
    file = tmp_path / "full.yaml"
    file.write_text(dump_config(config))
    keys = [key for key in known_keys(Config) if key != "reward.terms[0].kwargs"]
    assert "optim.lr" in keys
    assert "reward.terms[0].weight" in keys
    assert load_config(file, [f"{key}={_value(config, key)}" for key in keys]) == config


def _value(config: Config, key: str) -> str:
    value: object = config
    for part in key.replace("[0]", ".0").split("."):
        value = value[0] if isinstance(value, list) else getattr(value, part)
    if key == "reward.terms":
        return "[{name: accuracy, weight: 0.9}, {name: format, weight: 0.1}]"
    return "null" if value is None else str(value)
