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

SWIFT = """
    --rlhf_type --model --external_plugins --reward_funcs --use_vllm --vllm_device --vllm_gpu_memory_utilization
    --train_type --torch_dtype --dataset --max_length --max_completion_length --num_train_epochs
    --per_device_train_batch_size --per_device_eval_batch_size --learning_rate --gradient_accumulation_steps
    --save_strategy --eval_strategy --eval_steps --save_steps --save_total_limit --logging_steps --output_dir
    --warmup_ratio --dataloader_num_workers --num_generations --temperature --system --deepspeed --log_completions
    --report_to --num_iterations num_infer_workers async_generate --beta NPROC_PER_NODE
"""
MM_EUREKA = """
    --ref_num_nodes --ref_num_gpus_per_node --remote_rm_url --actor_num_nodes --actor_num_gpus_per_node
    --vllm_num_engines --vllm_tensor_parallel_size --colocate_all_models --vllm_enable_sleep
    --vllm_gpu_memory_utilization --vllm_sync_backend --pretrain --save_path --micro_train_batch_size
    --train_batch_size --micro_rollout_batch_size --rollout_batch_size --temperature --n_samples_per_prompt --lambd
    --gamma --max_epochs --num_episodes --prompt_max_len --max_samples --generate_max_len --advantage_estimator
    --zero_stage --bf16 --actor_learning_rate --init_kl_coef --prompt_data --disable_fast_tokenizer --input_key
    --adam_offload --flash_attn --gradient_checkpointing --save_steps --ckpt_path --max_ckpt_num --save_hf_ckpt
    --freeze_prefix --enable_accuracy_filter --accuracy_lower_bound --accuracy_upper_bound --use_tensorboard
    --load_checkpoint --freezing_filter_steps --use_adora --adora_lamda --use_dapo
"""
ORIGINAL_FLAGS = {
    "siirl_mm_eureka_7b": """
        adv_estimator data.train_files data.val_files train_batch_size max_prompt_length max_response_length
        filter_overlong_prompts truncation data.shuffle model.path optim.lr use_remove_padding use_fused_kernels
        ppo_mini_batch_size ppo_micro_batch_size_per_gpu use_kl_loss grad_clip clip_ratio kl_loss_coef kl_loss_type
        enable_gradient_checkpointing param_offload optimizer_offload log_prob_micro_batch_size_per_gpu
        rollout.tensor_model_parallel_size rollout.name gpu_memory_utilization max_model_len enable_chunked_prefill
        enforce_eager free_cache_engine rollout.n prompt_length response_length disable_mm_preprocessor_cache
        kl_ctrl.kl_coef critic_warmup trainer.logger project_name experiment_name n_gpus_per_node nnodes save_freq
        test_freq total_epochs resume_mode max_actor_ckpt_to_keep default_local_dir val_before_train
    """,
    "mm_eureka_7b": MM_EUREKA,
    "verl_boxed_7b": """
        adv_estimator data.train_files data.val_files train_batch_size max_prompt_length max_response_length
        filter_overlong_prompts truncation image_key model.path optim.lr use_remove_padding ppo_mini_batch_size
        ppo_micro_batch_size_per_gpu use_kl_loss kl_loss_coef kl_loss_type entropy_coeff enable_gradient_checkpointing
        param_offload optimizer_offload log_prob_micro_batch_size_per_gpu rollout.tensor_model_parallel_size
        rollout.name disable_mm_preprocessor_cache gpu_memory_utilization enable_chunked_prefill enforce_eager
        free_cache_engine rollout.n use_kl_in_reward critic_warmup project_name experiment_name n_gpus_per_node nnodes
        save_freq test_freq total_epochs
    """,
    "clevr_count_3b": SWIFT + "--vllm_max_model_len",
    "geoqa_3b": SWIFT + "--repetition_penalty --max_grad_norm MAX_PIXELS",
    "open_r1_3b": SWIFT + "--repetition_penalty --max_grad_norm MAX_PIXELS",
    "mathvista_dr_grpo": """
        model.name load_in_4bit use_gradient_checkpointing lora.r lora.alpha finetune_vision_layers
        finetune_language_layers dataset.path dataset.split max_samples image_size reasoning_start reasoning_end
        solution_start solution_end formatting_reward correctness_reward per_device_train_batch_size
        gradient_accumulation_steps learning_rate num_generations max_steps loss_type
    """,
}


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


@pytest.mark.parametrize("name", ORIGINAL_FLAGS)
def test_the_document_has_every_flag_of_the_original(name: str) -> None:
    """In its own section, in that of the run which it says it is like, or in what holds for all."""
    like = {"geoqa_3b": ["clevr_count_3b"], "open_r1_3b": ["geoqa_3b", "clevr_count_3b"]}.get(name, [])
    pages = [
        RECIPES.split("\n## siiRL")[0],
        *(section(ROOT / f"configs/presets/{each}.yaml") for each in (name, *like)),
    ]
    told = " ".join(re.findall(r"`([^`]*)`", "\n".join(pages)))
    missing = [
        flag for flag in ORIGINAL_FLAGS[name].split() if not re.search(rf"(?<![\w-]){re.escape(flag)}(?!\w)", told)
    ]
    assert missing == []


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
