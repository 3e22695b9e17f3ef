"""Entry points that SGLang calls in each of its processes: the CPU platform and our hooks. Both are inert elsewhere.

SGLang logs an exception in a plugin and carries on without it, so the launcher checks afterwards that the hooks hold.
"""

from __future__ import annotations

import os

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.rollout.launch_settings import inherited_settings


def cpu_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: the CPU platform, or None where CUDA or SGLang's own CPU engine is used."""
    if _has_cuda() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    declare_torchvision_ops()
    return "megatron_mmrl.rollout.sglang_platform:TorchCpuPlatform"


def register() -> None:
    """Entry point ``sglang.srt.plugins``: install our hooks. Does nothing outside our engines."""
    settings = inherited_settings()
    if settings is None:
        return
    declare_torchvision_ops()
    from megatron_mmrl.rollout import sglang_hooks

    sglang_hooks.install_token_ban(settings.banned_token_ids)
    sglang_hooks.install_graph_capture()
    if settings.deterministic:
        sglang_hooks.install_seeded_sampling()
    if not _has_cuda():
        sglang_hooks.install_batched_attention(deterministic=settings.deterministic)
        sglang_hooks.install_gpu_sizes()
        sglang_hooks.install_fork_start()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
