"""What the trainer gives up while the engine has the device: optimizer state to host memory, gradients to nowhere.

Storages are emptied and filled again, so every view of them (Megatron's optimizer keeps many) stays a view. Host memory
is pinned, so that copies run at the speed of the bus, and is kept: pinning takes longer than copying. Weights stay
where they are, because the engine reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor, UntypedStorage

from megatron_mmrl.parallel.device import on_cuda, synchronize

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


class Parking:
    """Storages that are away from the device. Use: ``park``, then ``restore``, and again."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # host memory, reused by size
        self._away: list[tuple[UntypedStorage, Tensor]] = []
        self._dropped: list[tuple[UntypedStorage, int]] = []

    def park(self, kept: Iterable[Tensor], dropped: Iterable[Tensor]) -> int:
        """Free the device memory behind these tensors; returns the bytes that went to the host.

        Args:
            kept: come back as they are; all of the storage behind each goes.
            dropped: come back as zeros.

        Raises:
            RuntimeError: something is parked already.
        """
        if self._away or self._dropped:
            raise RuntimeError("there is something parked already; call restore first")
        for storage in _storages(kept):
            host = self._host(storage.nbytes())
            host.copy_(_content(storage), non_blocking=True)
            self._away.append((storage, host))
        synchronize()
        self._dropped = [(storage, storage.nbytes()) for storage in _storages(dropped)]
        for storage in [storage for storage, _ in (*self._away, *self._dropped)]:
            storage.resize_(0)
        if on_cuda():
            torch.cuda.empty_cache()  # the engine is another process
        return sum(host.nbytes for _, host in self._away)

    def restore(self) -> int:
        """Bring everything back; returns the bytes that came from the host. Nothing parked: nothing happens."""
        moved = sum(host.nbytes for _, host in self._away)
        for storage, nbytes in self._dropped:
            storage.resize_(nbytes)
            _content(storage).zero_()
        for storage, host in self._away:
            storage.resize_(host.nbytes)
            _content(storage).copy_(host, non_blocking=True)
        synchronize()
        self._free += [host for _, host in self._away]
        self._away, self._dropped = [], []
        return moved

    def _host(self, nbytes: int) -> Tensor:
        for index, host in enumerate(self._free):
            if host.nbytes == nbytes:
                return self._free.pop(index)
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda())


def optimizer_tensors(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Float32 weights and Adam's moments of this rank, save what is the model's own memory (float32 models)."""
    weights = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in (part for part in parts if not part.is_stub_optimizer):
        mains = (main for group in part.optimizer.param_groups for main in group["params"])
        moments = (value for state in part.optimizer.state.values() for value in state.values())
        for tensor in (*mains, *moments):
            on_device = isinstance(tensor, Tensor) and tensor.dim() > 0  # torch keeps the step, a scalar, on the host
            if on_device and tensor.untyped_storage().data_ptr() not in weights:
                yield tensor


def gradient_buffers(chunks: Sequence[DistributedDataParallel]) -> Iterator[Tensor]:
    """The memory in which Megatron adds up gradients; it is zeroed before it is used."""
    for chunk in chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            yield buffer.grad_data


def _storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Each storage once, empty ones left out."""
    by_address = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage for storage in by_address.values() if storage.nbytes()]


def _content(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
