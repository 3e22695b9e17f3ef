"""The random generators of this process: Python, numpy, torch, CUDA and Megatron's named ones."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_mmrl.parallel.device import on_cuda

_TRACKER = "megatron/"


def rng_tensors() -> dict[str, Tensor]:
    """States that are byte tensors: torch's, CUDA's and Megatron's (one per name)."""
    states = {"torch": torch.get_rng_state()}
    if on_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    states.update({_TRACKER + name: state for name, state in get_cuda_rng_tracker().get_states().items()})
    return states


def rng_json() -> dict[str, Any]:
    """States that JSON can hold: Python's and numpy's global generators."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }


def restore_rng(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put all generators back to where ``rng_tensors`` and ``rng_json`` found them."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(_TRACKER): state for name, state in tensors.items() if name.startswith(_TRACKER)}
    )
    torch.set_rng_state(tensors["torch"])
    if on_cuda():
        torch.cuda.set_rng_state(tensors["cuda"])
