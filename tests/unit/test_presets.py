"""The presets: each can be started as it stands, and docs/recipes.md says what is in it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mmrl.cluster.preflight import preflight
from megatron_mmrl.config import Config, load_config
from megatron_mmrl.config.build import known_keys
from megatron_mmrl.data.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SETTING = re.compile(r"`([a-z0-9_]+(?:\.[a-z0-9_]+)+)=([^`]*)`")


def model_of(config: Config) -> dict[str, Any]:
    """The published ``config.json`` of the model that the preset names."""
    size = re.search(r"Qwen2\.5-VL-(\d+B)-Instruct$", config.model.path)
    assert size, config.model.path
    return yaml.safe_load((ROOT / "configs" / "models" / f"qwen2_5_vl_{size.group(1).lower()}.yaml").read_text())


def value_of(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def section(preset: Path) -> str:
    """What docs/recipes.md says under the heading that names the preset."""
    found = re.findall(rf"^## [^\n]*configs/presets/{preset.name}`\)\n(.*?)(?=^## |\Z)", RECIPES, re.M | re.S)
    assert len(found) == 1, f"docs/recipes.md has {len(found)} sections for {preset.name}"
    return found[0]


def test_there_is_one_for_each_experiment() -> None:
    assert [preset.stem for preset in PRESETS] == [
        "clevr_count_3b", "geoqa_3b", "mathvista_dr_grpo", "mm_eureka_32b", "mm_eureka_7b", "open_r1_3b",
        "siirl_mm_eureka_7b", "verl_boxed_7b",
    ]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_it_could_start(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and data are where the preset says: then everything that is checked before a process starts is right."""
    monkeypatch.chdir(tmp_path)
    config = load_config(preset)
    Path(config.model.path).mkdir(parents=True)
    (Path(config.model.path) / "config.json").write_text(json.dumps(model_of(config)))
    for file in (*config.data.train_files, *config.data.eval_files):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    preflight(config)
    assert config.rollout.request_timeout_s >= 1800  # thousands of long responses wait in line
    assert config.parallel.timeout_s >= config.rollout.request_timeout_s  # the other ranks wait for them too


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_document_tells_its_values(preset: Path) -> None:
    config = load_config(preset)
    rows = [line for line in section(preset).splitlines() if line.startswith("|")]
    assert rows[0] == "| original | value | ours | said in |"
    told = 0
    for row in rows[2:]:
        _, _, ours, said_in = (cell.strip() for cell in row.strip("|").split("|"))
        assert said_in in ("text", "code", "chosen"), row
        settings = SETTING.findall(ours)
        assert settings, f"no key in {row}"
        for key, value in settings:
            assert value_of(config, key) == yaml.safe_load(value), f"{row}: the preset has {value_of(config, key)!r}"
            told += 1
    assert told >= 8


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_override_that_the_text_names_works(preset: Path) -> None:
    """Code such as ``a.b=1 c.d=2`` in the text about a preset is what can be put behind its ``--config``."""
    sections = {key.split(".")[0] for key in known_keys(Config)}
    tried = 0
    for code in re.findall(r"`([^`]*=[^`]*)`", section(preset)):
        settings = re.split(r"\s+(?=[a-z_0-9.]+=)", code)
        ours = all(setting.split(".")[0] in sections and " " not in setting.split("=")[0] for setting in settings)
        if ours and "kl_ctrl" not in code:  # a key of siiRL's own
            load_config(preset, [setting.replace("NAME", "mine") for setting in settings])
            tried += 1
    assert tried >= 8


def test_every_value_that_is_not_a_path_or_a_size_is_in_the_document() -> None:
    """What a preset sets and its section does not tell is machinery, not a hyperparameter."""
    machinery = {
        "run.output_dir", "model.path", "model.dtype", "data.train_files", "data.eval_files", "rollout.num_engines",
        "rollout.tensor_parallel_size", "rollout.request_timeout_s", "rollout.startup_timeout_s",
        "reward.num_workers", "trainer.micro_batch_tokens", "algorithm.dynamic_sampling.max_rounds",
    }  # fmt: skip
    untold = {}
    for preset in PRESETS:
        if preset.stem in ("mm_eureka_32b", "open_r1_3b"):  # their sections tell what differs from their siblings'
            continue
        text = section(preset)
        keys = {key for key in leaves(yaml.safe_load(preset.read_text())) if not key.startswith("parallel.")}
        untold[preset.stem] = sorted(key for key in keys - machinery if f"`{key}=" not in text)
    assert {name: keys for name, keys in untold.items() if keys} == {}


@pytest.mark.parametrize(
    "script", sorted((ROOT / "examples").glob("*/*.sh")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_scripts_of_the_examples_name_what_there_is(script: Path) -> None:
    """That they run is left to tests/e2e/test_presets.py; here, that shell and options are right."""
    subprocess.run(["sh", "-n", script], check=True)
    text = script.read_text()
    for name in re.findall(r"configs/presets/(\w+)\.yaml", text):
        assert (ROOT / "configs" / "presets" / f"{name}.yaml") in PRESETS
        assert f"configs/presets/{name}.yaml" in (script.parent / "README.md").read_text()
    formats = re.findall(r"--format (\w+)", text) + re.findall(r"^ *prepare (\w+) ", text, re.M)
    assert ("prepare" in script.name) == bool(formats)
    assert set(formats) <= set(FORMATS)


def test_every_preset_has_an_example() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "examples").glob("*/README.md"))
    assert [preset.name for preset in PRESETS if f"configs/presets/{preset.name}" not in pages] == []


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        leaf
        for key, value in tree.items()
        for leaf in (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]
