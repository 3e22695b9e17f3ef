"""GPU memory that other processes can map: CUDA's driver API, called directly.

Not yet run on a GPU. What it relies on, from the CUDA driver API's reference: memory of ``cuMemAlloc`` can be exported
with ``cuIpcGetMemHandle`` (memory mapped virtually cannot); a handle cannot be opened in the process that exported it;
opened once and kept, it stays valid until the exporting process ends or frees it, so neither is freed before the end
of its process. IPC orders nothing: writers synchronize the device before readers of another process begin.
"""

from __future__ import annotations

import base64
import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_mmrl.config.checks import require

_LAZY_ENABLE_PEER_ACCESS = 1  # so that a block on another GPU of the machine can be read


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class _Memory:
    """Bytes at a device address, as torch takes them without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def allocate(nbytes: int, device: torch.device) -> tuple[Tensor, Mapping[str, Any]]:
    """Zeros, [nbytes] uint8, that are never freed, and the handle by which ``open_memory`` finds them.

    Raises:
        RuntimeError: out of memory, or no CUDA IPC on this machine.
    """
    address, handle = ctypes.c_uint64(), _IpcHandle()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context current in this thread
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        tensor = torch.as_tensor(_Memory(_value(address), nbytes), device=torch.device("cuda", _index(device)))
        tensor.zero_()
        torch.cuda.current_stream().synchronize()
    return tensor, {
        "kind": "cuda",
        "device": _uuid(_index(device)),
        "ipc": base64.b64encode(bytes(handle)).decode(),
        "nbytes": nbytes,
    }


def open_memory(handle: Mapping[str, Any]) -> Tensor:
    """Another process's memory, [nbytes] uint8; opened at the first call and kept.

    Raises:
        ValueError: this process does not see the device that it is on.
        RuntimeError: its process has ended, or is this one.
    """
    return _opened(handle["device"], handle["ipc"], handle["nbytes"])


@functools.cache
def _opened(uuid: str, ipc: str, nbytes: int) -> Tensor:
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    require(uuid in visible, f"the memory is on GPU {uuid}; this process sees only {sorted(visible)}")
    address = ctypes.c_uint64()
    exported = _IpcHandle.from_buffer_copy(base64.b64decode(ipc, validate=True))
    with torch.cuda.device(visible[uuid]):
        torch.cuda.current_stream().synchronize()
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), exported, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return torch.as_tensor(_Memory(_value(address), nbytes), device=torch.device("cuda", visible[uuid]))


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name} failed with status {status}: {(text.value or b'unknown').decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _value(address: ctypes.c_uint64) -> int:
    return int(address.value)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
