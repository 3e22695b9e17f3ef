"""SGLang's platform interface for any CPU, in plain PyTorch; SGLang's own CPU engine needs a compiled kernel package.

Imported by SGLang, through the entry point in ``sglang_plugin``, while SGLang itself is still being imported: the
parts that need more of SGLang than its platform classes are therefore imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

if TYPE_CHECKING:
    import torch
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import KVCache


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU with PyTorch's native attention and no compiled SGLang kernels."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_paged_allocator_cls(self) -> object:
        return _slot_allocator

    def get_dispatch_key_name(self) -> str:
        return "native"


def _slot_allocator(  # SGLang calls what it takes for a class with these arguments
    size: int, *, page_size: int, dtype: torch.dtype, device: str, kvcache: KVCache, need_sort: bool
) -> TokenToKVPoolAllocator:
    """One KV slot per token: SGLang asks a platform for a *paged* allocator, and pages of one token are just slots."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    if page_size != 1:
        raise ValueError(f"page_size={page_size}: the CPU platform has pages of 1 token")
    return TokenToKVPoolAllocator(size, dtype=dtype, device=device, kvcache=kvcache, need_sort=need_sort)
