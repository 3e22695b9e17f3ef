"""Memory that another process can map: what the trainer owns and its rollout engine reads.

On a CPU a block is an anonymous file (``memfd_create``), reached through ``/proc/<pid>/fd``. It has no name, so nothing
of it is left when its last process ends, whatever ended it. On a GPU it is a plain ``cuMemAlloc`` allocation, which
CUDA IPC can export; what torch's allocator gives may be a part of a larger allocation, go to somebody else when freed,
or (expandable segments) be mapped virtually, which cannot be exported.

Megatron's parameters are moved into such blocks between the building of DDP and that of the optimizer: training goes on
in them, to the bit as before.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require
from megatron_mmrl.parallel.geometry import Shape
from megatron_mmrl.reshard import cuda_ipc
from megatron_mmrl.reshard.places import Handle, Place, packed

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


class SharedBlock:
    """One piece of exportable memory, filled with zeros. It lives as long as this object or a mapping of it does.

    Args:
        nbytes: at least 1.
        device: a CPU, or a CUDA device.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        require(nbytes > 0, f"a shared block of {nbytes} bytes: it needs at least one")
        self.nbytes = nbytes
        self.tensor: Tensor
        """All of it, [nbytes] uint8."""
        self.handle: Handle
        if device.type == "cuda":
            self.tensor, self.handle = cuda_ipc.allocate(nbytes, device)
        else:
            descriptor = os.memfd_create("mmrl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, descriptor)
            os.ftruncate(descriptor, nbytes)
            # A file that shrank would end every process that reads it (SIGBUS).
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.tensor = _mapped(descriptor, nbytes)
            self.handle = {
                "kind": "memfd",
                "pid": os.getpid(),
                "descriptor": descriptor,
                "inode": os.fstat(descriptor).st_ino,
                "nbytes": nbytes,
            }


def open_block(handle: Handle) -> Tensor:
    """Map another process's block: [nbytes] uint8, the same memory. It is unmapped with the last view of it.

    Raises:
        ValueError: not a handle; or its process has ended, and what is found in its place is another file.
        OSError: the block's process has ended, or belongs to another user.
    """
    if handle.get("kind") == "cuda":
        return cuda_ipc.open_memory(handle)
    require(handle.get("kind") == "memfd", f"{dict(handle)} is not the handle of a shared block")
    path = f"/proc/{handle['pid']}/fd/{handle['descriptor']}"
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        require(
            (found.st_ino, found.st_size) == (handle["inode"], handle["nbytes"]),
            f"{path} is not the block of {handle['nbytes']} bytes that it was: its process has ended",
        )
        return _mapped(descriptor, handle["nbytes"])
    finally:
        os.close(descriptor)


def typed(block: Tensor, offset: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The contiguous tensor of this shape and type that begins at byte ``offset`` of ``block``; shares its memory.

    Raises:
        ValueError: it does not fit.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    require(
        offset >= 0 and offset + nbytes <= block.numel() and offset % dtype.itemsize == 0,
        f"{dtype} of shape {list(shape)} at byte {offset} does not fit into a block of {block.numel()} bytes",
    )
    return block[offset : offset + nbytes].view(dtype).view(shape)


class SharedParameters:
    """Where a rank's parameters are. Made by ``share_parameters``."""

    def __init__(self, blocks: Sequence[SharedBlock], places: Mapping[torch.nn.Parameter, Place]) -> None:
        self.blocks = tuple(blocks)
        self._places = dict(places)

    def place(self, parameter: torch.nn.Parameter) -> Place:
        """(number in ``blocks``, byte at which it begins). Raises KeyError for a parameter of another model."""
        return self._places[parameter]


def share_parameters(chunks: Sequence[DistributedDataParallel]) -> SharedParameters:
    """Move every parameter of ``chunks`` into shared blocks, in place: values stay, addresses change.

    To be called after DDP has been built and before the optimizer is, which takes views of the parameters. A buffer of
    DDP (what the distributed optimizer trains) becomes one block; all that is in no buffer, such as what is frozen,
    goes into one more. Needs the memory of the largest buffer twice for a moment.
    """
    blocks: list[SharedBlock] = []
    places: dict[torch.nn.Parameter, Place] = {}
    for chunk in chunks:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            if buffer.param_data is not None:
                blocks.append(_move_buffer(buffer))
                size = buffer.param_data.element_size()
                places |= {
                    parameter: (len(blocks) - 1, start * size)
                    for parameter, (start, _, _) in buffer.param_index_map.items()
                }
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group.cached_param_buffer_shard_list = [None] * len(group.buckets)  # views of the old memory
    others = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter not in places]
    if others:
        block, offsets = _move_each(others)
        blocks.append(block)
        places |= {parameter: (len(blocks) - 1, offset) for parameter, offset in zip(others, offsets, strict=True)}
    return SharedParameters(blocks, places)


def _move_buffer(buffer: Any) -> SharedBlock:
    """Move one of DDP's buffers, and every view of it that DDP keeps."""
    old = buffer.param_data
    block = SharedBlock(old.nbytes, old.device)
    buffer.param_data = typed(block.tensor, 0, tuple(old.shape), old.dtype)
    buffer.param_data.copy_(old)
    for bucket in buffer.buckets:
        bucket.param_data = buffer.param_data[bucket.offset : bucket.offset + bucket.param_data.numel()]
    for parameter, (start, end, _) in buffer.param_index_map.items():
        parameter.data = buffer.param_data[start:end].view(parameter.shape)
    return block


def _move_each(parameters: Sequence[torch.nn.Parameter]) -> tuple[SharedBlock, list[int]]:
    offsets, nbytes = packed(parameter.nbytes for parameter in parameters)
    block = SharedBlock(nbytes, parameters[0].device)
    for parameter, offset in zip(parameters, offsets, strict=True):
        new = typed(block.tensor, offset, tuple(parameter.shape), parameter.dtype)
        new.copy_(parameter.data)
        parameter.data = new
    return block, offsets


def _mapped(descriptor: int, nbytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)
