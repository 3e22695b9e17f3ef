"""Our hooks on SGLang: tokens that cannot be drawn, draws that depend on a seed and nothing else, less waiting on CPUs.

Imported inside SGLang's processes only. Written against SGLang 0.5.20, through its public hook registry.
"""

from __future__ import annotations

import multiprocessing
import pkgutil
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from megatron_mmrl.rollout.seeded_noise import draw_tokens

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import MultimodalDataItem
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.server_args import ServerArgs

_PREPROCESS_LOGITS = "sglang.srt.layers.sampler.Sampler._preprocess_logits"
_DRAW = "sglang.srt.layers.sampler.multinomial_with_seed"
_BATCH_INVARIANT_MODE = "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode"
_IMAGE_FEATURES = "sglang.srt.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration.get_image_feature"
_SEND = "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request"
_ALL_REDUCE = "sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce"
_ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_CPU_SIZES = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"
_UPDATE = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"
_START_METHOD = "sglang.srt.entrypoints.engine._set_envs_and_config"

_installed: dict[str, Callable[..., object]] = {}


def install_token_ban(token_ids: Sequence[int]) -> None:
    """Set the logits of ``token_ids`` to minus infinity for every request, greedy ones too.

    It happens before the division by the temperature and before the softmax, so the log-probs that SGLang returns
    are those of the distribution over the tokens that are left.
    """
    banned = torch.tensor(sorted(set(token_ids)), dtype=torch.int64)

    def ban(
        preprocess: Callable[..., torch.Tensor],
        sampler: Sampler,
        logits: torch.Tensor,
        sampling_info: SamplingBatchInfo,
    ) -> torch.Tensor:
        nonlocal banned
        logits = preprocess(sampler, logits, sampling_info)
        if banned.device != logits.device:
            banned = banned.to(logits.device)
        return logits.index_fill_(1, banned, float("-inf"))

    _install(_PREPROCESS_LOGITS, ban, HookType.AROUND)


def install_seeded_sampling() -> None:
    """Give each copy of a request its own seed and, on a CPU, make SGLang's deterministic mode possible.

    On a GPU SGLang brings its own batch-invariant kernels and seeded draws; only the seeds of the copies are ours.
    """
    _install(_SEND, _send_and_advance_seed, HookType.AROUND)
    _install(_IMAGE_FEATURES, _encode_one_by_one, HookType.AROUND)
    if torch.cuda.is_available():
        return
    from sglang.srt.server_args import (
        add_deterministic_attention_backend_choices,
        add_radix_supported_deterministic_attention_backend_choices,
    )

    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    _install(_DRAW, draw_tokens, HookType.REPLACE)
    _install(_BATCH_INVARIANT_MODE, _rely_on_strict_products, HookType.REPLACE)
    _install(_ALL_REDUCE, _sum_in_rank_order, HookType.AROUND)


def install_batched_attention(*, deterministic: bool) -> None:
    """Replace SGLang's CPU attention backend by ours (no effect where another backend is used)."""
    from megatron_mmrl.rollout.sglang_attention import BatchedAttention, BatchedDecodeAttention

    _install(_ATTENTION, BatchedDecodeAttention if deterministic else BatchedAttention, HookType.REPLACE)


def install_graph_capture() -> None:
    """Capture SGLang's CUDA graphs again when its parameters have moved: a graph reads the addresses it was made with.

    Not yet run on a GPU. On a CPU there is nothing to capture, and the same calls return at once.
    """
    _install(_UPDATE, _update_and_capture, HookType.AROUND)


def install_gpu_sizes() -> None:
    """Hold weights on a CPU as on a GPU: with fewer key/value heads than ranks, each is repeated.

    SGLang's CPU engine pads heads and layers instead until the ranks divide them, which only its own loader can fill.
    """
    _install(_CPU_SIZES, _sizes_as_they_are, HookType.REPLACE)


def install_fork_start() -> None:
    """Fork SGLang's workers off the launcher instead of spawning them: each would import SGLang again, 8 s of CPU.

    Only where there is no CUDA, whose state does not survive a fork. At that point the launcher has one thread.
    """
    _install(_START_METHOD, _start_by_fork, HookType.AFTER)


def installed() -> bool:
    """Whether SGLang called our plugin at all."""
    return bool(_installed)


def missing_hooks() -> list[str]:
    """Hooks that were asked for and did not take (call after ``load_plugins``): SGLang only logs such a failure."""
    return [target for target, hook in _installed.items() if not _in_effect(pkgutil.resolve_name(target), hook)]


def _install(target: str, hook: Callable[..., object], kind: HookType) -> None:
    HookRegistry.register(target, hook, kind)
    _installed[target] = hook


def _in_effect(found: object, hook: Callable[..., object]) -> bool:
    return found is hook if isinstance(hook, type) else hasattr(found, "__wrapped__")


async def _send_and_advance_seed(
    send: Callable[[TokenizerManager, TokenizedGenerateReqInput], Awaitable[None]],
    manager: TokenizerManager,
    request: TokenizedGenerateReqInput,
) -> None:
    """The n copies of a request share one ``SamplingParams``, sent one after the other: step its seed in between."""
    params = request.sampling_params
    await send(manager, request)
    if params.sampling_seed is not None:
        params.sampling_seed += 1


def _encode_one_by_one(
    encode: Callable[..., torch.Tensor], model: Qwen2_5_VLForConditionalGeneration, items: list[MultimodalDataItem]
) -> torch.Tensor:
    """SGLang encodes the images of all requests that come together as one long sequence, which shows in the bits."""
    return torch.cat([encode(model, [item]) for item in items])


def _rely_on_strict_products() -> None:
    """Stands in for SGLang's Triton kernels: on a CPU, MKL's strict mode (set at launch) makes rows independent."""


def _sum_in_rank_order(
    all_reduce: Callable[..., torch.Tensor], group: GroupCoordinator, values: torch.Tensor
) -> torch.Tensor:
    """Gloo adds the ranks' parts of a number in an order that depends on where it stands in the tensor, hence on the
    batch. With two ranks there is only one sum."""
    if not values.is_cpu or group.world_size <= 2:
        return all_reduce(group, values)
    parts = [torch.empty_like(values) for _ in range(group.world_size)]
    torch.distributed.all_gather(parts, values.contiguous(), group=group.device_group)
    values.copy_(parts[0])
    for part in parts[1:]:
        values.add_(part)
    return values


def _update_and_capture(
    update: Callable[..., tuple[bool, str]], updater: WeightUpdater, *args: object, **kwargs: object
) -> tuple[bool, str]:
    before = _addresses(updater)
    outcome = update(updater, *args, **kwargs)
    if _addresses(updater) != before:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the memory that the parameters had
        runner = updater.get_model_runner()
        runner.init_prefill_cuda_graph()  # in the order of SGLang's start; each drops its old graphs first
        runner.init_decode_cuda_graph()
    return outcome


def _addresses(updater: WeightUpdater) -> list[int]:
    return [parameter.data_ptr() for parameter in updater.get_model().parameters()]


def _sizes_as_they_are(model_config: ModelConfig, load_config: LoadConfig, tp_size: int) -> ModelConfig:
    return model_config


def _start_by_fork(_: None, server_args: ServerArgs) -> None:
    multiprocessing.set_start_method("fork", force=True)
