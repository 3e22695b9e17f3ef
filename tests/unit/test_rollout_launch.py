"""What an engine is started with: settings that only their owner can read, a clean environment, the right fields."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.batch_invariance import rows_are_independent
from megatron_mmrl.rollout.launch_settings import SETTINGS_VARIABLE, LaunchSettings, read_settings, write_settings
from megatron_mmrl.rollout.server_args import Endpoint, EngineModel, environment, server_args
from megatron_mmrl.rollout.sglang_plugin import register

SETTINGS = LaunchSettings(
    server_args={"port": 1, "api_key": "k"}, banned_token_ids=(3, 5), deterministic=True, parent_pid=7
)
MODEL = EngineModel(path=Path("/model"), dtype="float32", device="cpu", seed=3)
ENDPOINT = Endpoint(port=4321, api_key="one", admin_key="two")


def test_settings_come_back_from_a_file_that_only_its_owner_reads(tmp_path):
    path = tmp_path / "settings.json"
    write_settings(path, SETTINGS)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_settings(path) == SETTINGS


def test_settings_readable_by_others_are_refused(tmp_path):
    path = tmp_path / "settings.json"
    write_settings(path, SETTINGS)
    path.chmod(0o640)
    with pytest.raises(PermissionError, match="mode 640"):
        read_settings(path)


def test_a_file_that_is_already_there_is_not_trusted(tmp_path):
    path = tmp_path / "settings.json"
    path.touch()
    with pytest.raises(FileExistsError):
        write_settings(path, SETTINGS)


def test_the_plugin_does_nothing_outside_our_engines(monkeypatch):
    monkeypatch.delenv(SETTINGS_VARIABLE, raising=False)
    register()  # would import sglang and register hooks


def test_cpu_server_fields():
    args = server_args(RolloutConfig(tensor_parallel_size=2, max_running_requests=9), MODEL, ENDPOINT)
    expected = {
        "model_path": "/model",
        "host": "127.0.0.1",
        "port": 4321,
        "api_key": "one",
        "admin_api_key": "two",
        "load_format": "dummy",
        "dtype": "float32",
        "tp_size": 2,
        "random_seed": 3,
        "max_total_tokens": 65_536,
        "max_running_requests": 9,
        "device": "cpu",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sleep_on_idle": True,
        "log_level": "warning",
        "enable_deterministic_inference": False,
    }
    assert expected.items() <= args.items()


def test_a_gpu_server_chooses_its_own_kernels():
    args = server_args(RolloutConfig(), replace(MODEL, device="cuda"), ENDPOINT)
    assert not {"attention_backend", "mm_attention_backend", "sampling_backend", "disable_cuda_graph"} & args.keys()
    assert (args["device"], args["base_gpu_id"], args["max_total_tokens"]) == ("cuda", 0, None)


def test_environment_drops_what_torchrun_set_and_keeps_the_rest():
    inherited = {"PATH": "/bin", "RANK": "1", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "y", "OMP_NUM_THREADS": "3"}
    env = environment(inherited, RolloutConfig(), MODEL, Path("/scratch"))
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & env.keys()
    assert env.items() >= {"PATH": "/bin", "OMP_NUM_THREADS": "3", "TMPDIR": "/scratch"}.items()
    assert "MKL_CBWR" not in env


def test_environment_of_a_deterministic_engine_and_of_tensor_parallel_ranks():
    config = RolloutConfig(deterministic=True, tensor_parallel_size=3)
    env = environment({}, config, MODEL, Path("/scratch"))
    assert env["MKL_CBWR"] == "AVX2,STRICT"
    assert env["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1|2"


def test_products_that_depend_on_the_batch_are_found(monkeypatch):
    def exact(x, weight):
        return (x[:, None, :1] + weight[None, :, :1]).sum(-1)

    monkeypatch.setattr(torch.nn.functional, "linear", exact)
    assert rows_are_independent("float32")
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: exact(x, weight) * (1 + 1e-7 * (len(x) == 1)))
    assert not rows_are_independent("float32")


@pytest.mark.parametrize(
    ("visible", "expected"), [({}, "5,4"), ({"CUDA_VISIBLE_DEVICES": "7,6,5,4,3,GPU-ab"}, "GPU-ab,3")], ids=str
)
def test_an_engine_sees_its_own_gpus_in_the_order_of_its_ranks(visible, expected):
    model = replace(MODEL, device="cuda", devices=(5, 4))
    assert environment(visible, RolloutConfig(), model, Path("/scratch"))["CUDA_VISIBLE_DEVICES"] == expected


def test_an_engine_on_a_cpu_is_not_sent_to_a_second_numa_node():
    model = replace(MODEL, devices=(1,))
    assert server_args(RolloutConfig(), model, ENDPOINT)["base_gpu_id"] == 0
    assert environment({}, RolloutConfig(), model, Path("/scratch"))["CUDA_VISIBLE_DEVICES"] == ""


def test_a_repetition_penalty_counts_the_token_before():
    """With overlap SGLang draws a token before the one before it is penalised."""
    on_gpu = replace(MODEL, device="cuda")
    assert "disable_overlap_schedule" not in server_args(RolloutConfig(), on_gpu, ENDPOINT)
    args = server_args(RolloutConfig(repetition_penalty=1.1), on_gpu, ENDPOINT)
    assert args["disable_overlap_schedule"] is True
