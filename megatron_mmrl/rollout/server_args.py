"""From our configuration to the fields of SGLang's ``ServerArgs`` and the environment of its processes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.rollout.launch_settings import ServerArgValue

UNLOADED_VERSION = "none"
"""Weight version of an engine that still has its dummy weights."""

ATTACH_LOADER = "megatron_mmrl.reshard.attach.attach"
"""``load_format`` of an update that makes the engine's parameters the trainer's memory."""

CHECKSUM_LOADER = "megatron_mmrl.reshard.attach.checksums"
"""``load_format`` of an update that changes nothing and has the engine sum its parameters."""

_CPU_KV_TOKENS = 65_536  # SGLang would size the KV cache by a share of the whole machine's memory
_IMAGE_CACHE_MB = 256  # with it, SGLang's image processor runs once per distinct image and keeps our token ids
_CPU_ARGS: Mapping[str, ServerArgValue] = {
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "skip_tokenizer_init": True,  # we send and want token ids only
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an engine listens and what opens it."""

    port: int  # on 127.0.0.1
    api_key: str  # to generate
    admin_key: str  # to change weights, flush, pause

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """What the engine runs: a model directory without weights, and how."""

    path: Path
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    devices: tuple[int, ...] = ()  # index, on this node, of the GPU of each rank; (): the first ones
    seed: int = 0  # of the draws of an engine that is not deterministic


def server_args(config: RolloutConfig, model: EngineModel, endpoint: Endpoint) -> dict[str, ServerArgValue]:
    """Fields of ``ServerArgs``. On a GPU, attention and sampling backends are left to SGLang."""
    on_cpu = model.device == "cpu"
    args: dict[str, ServerArgValue] = {
        "model_path": str(model.path),
        "host": "127.0.0.1",
        "port": endpoint.port,
        "api_key": endpoint.api_key,
        "admin_api_key": endpoint.admin_key,
        "load_format": "dummy",
        "custom_weight_loader": [ATTACH_LOADER, CHECKSUM_LOADER],
        "weight_version": UNLOADED_VERSION,
        "device": model.device,
        "dtype": model.dtype,
        "tp_size": config.tensor_parallel_size,
        "base_gpu_id": 0,  # the environment shows the engine its own GPUs only
        "random_seed": model.seed,
        "max_total_tokens": _CPU_KV_TOKENS if on_cpu and config.max_total_tokens is None else config.max_total_tokens,
        "mem_fraction_static": config.mem_fraction_static,
        "max_running_requests": config.max_running_requests,
        "grammar_backend": "none",
        "sleep_on_idle": True,  # an idle scheduler would otherwise poll with a whole core
        "log_level": "warning",  # at "info" SGLang prints its arguments, keys included
        "image_processor_backend": "pil",  # the trainer's, to the bit
        "mm_preprocess_cache_size_mb": _IMAGE_CACHE_MB,
        "mm_enable_dp_encoder": config.mm_enable_dp_encoder,
        "enable_deterministic_inference": config.deterministic,
        "enable_memory_saver": not on_cpu,  # so that the KV cache can be released between steps
    }
    if config.repetition_penalty != 1:
        args["disable_overlap_schedule"] = True  # the next token would be drawn before its predecessor is penalised
    if on_cpu:
        args |= _CPU_ARGS
        if config.deterministic:
            args["chunked_prefill_size"] = -1  # where a prompt is cut depends on what is processed beside it
    return args


def environment(
    inherited: Mapping[str, str], config: RolloutConfig, model: EngineModel, scratch_dir: Path
) -> dict[str, str]:
    """Environment of the engine's processes.

    Args:
        inherited: the trainer rank's.
        scratch_dir: private directory for SGLang's sockets and temporary files.
    """
    env = {name: value for name, value in inherited.items() if not _is_torchrun_variable(name)}
    env["TMPDIR"] = str(scratch_dir)
    # Rendezvous through a file: torch's TCP store would listen on every interface of the machine, open to all.
    env["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{scratch_dir / 'rendezvous'}"
    env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = "lo"
    # SGLang keeps image features by image alone and never drops them when the weights change.
    env["SGLANG_VLM_CACHE_SIZE_MB"] = "0"
    if model.device == "cuda" and model.devices:
        visible = inherited.get("CUDA_VISIBLE_DEVICES", "").split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(
            visible[index] if visible != [""] else str(index) for index in model.devices
        )
    if model.device == "cpu":
        env.setdefault("OMP_NUM_THREADS", "1")
        env["CUDA_VISIBLE_DEVICES"] = ""
        # SGLang compiles small functions with inductor: 10 s at the first image, and a C++ compiler, for no gain here.
        env["TORCHDYNAMO_DISABLE"] = "1"
        if config.tensor_parallel_size > 1:  # else SGLang wants a NUMA node per rank
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(config.tensor_parallel_size))
        if config.deterministic:
            # Strict mode: a row of a product does not depend on the other rows, their number, or alignment.
            env["MKL_CBWR"] = "AVX2,STRICT"
    return env


def _is_torchrun_variable(name: str) -> bool:
    """Variables that would make SGLang's processes take themselves for ranks of the trainer."""
    return name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_")) or name in {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
