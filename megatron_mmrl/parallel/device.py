"""CUDA or CPU: the one question that everything else asks here."""

from __future__ import annotations

import os
from functools import cache
from typing import Literal

import torch


@cache
def on_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: ``cuda:LOCAL_RANK``, or the CPU where there is no CUDA."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda() else torch.device("cpu")


def synchronize() -> None:
    """Return when everything that was started on this process's device is done."""
    if on_cuda():
        torch.cuda.synchronize(device())


def backend() -> Literal["nccl", "gloo"]:
    """The collective library that goes with the device."""
    return "nccl" if on_cuda() else "gloo"


def dtype_of(name: Literal["float32", "bfloat16"]) -> torch.dtype:
    """``model.dtype`` as torch names it."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
