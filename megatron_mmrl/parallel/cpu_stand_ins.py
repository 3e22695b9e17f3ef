"""Let Megatron-core run without CUDA: the only place that stands in for ``torch.cuda``.

Megatron-core 0.16.1 asks for CUDA in three ways, and each has its own stand-in:

* ``torch.cuda.current_device()``, ``device="cuda"`` and the like, through its modules' global name ``torch``. In the
  loaded ``megatron.core`` modules, and nowhere else, that name is bound to a copy of torch's namespace whose few
  CUDA entries answer for the CPU. The real ``torch`` is not touched (transformers and others see what they expect),
  other calls cost nothing, and code that runs in backward is covered, which a ``TorchFunctionMode`` would not reach.
* ``Tensor.cuda()`` and ``Tensor.type()``: methods, so a ``TorchFunctionMode`` around the few functions that call them.
* the CUDA generator, which one function of ``tensor_parallel.random`` writes through torch's C interface.

On a CUDA machine ``install`` does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from megatron_mmrl.parallel.device import on_cuda

P = ParamSpec("P")
T = TypeVar("T")

_CPU = torch.device("cpu")
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
# Imported before the names are bound, so that every module a trainer uses is covered.
_PACKAGES = (
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel",
)


def install() -> None:
    """Make Megatron-core usable on the CPU; no effect on CUDA or when called again."""
    if on_cuda():
        return
    for package in _PACKAGES:
        importlib.import_module(package)
    stand_in = _torch_namespace()
    for module in _megatron_modules():
        if module.__dict__.get("torch") is torch:
            module.torch = stand_in
    _wrap_functions()


@functools.cache
def _torch_namespace() -> ModuleType:
    namespace = ModuleType("torch")
    namespace.__dict__.update({name: value for name, value in vars(torch).items() if name != "__name__"})
    for name in _FACTORIES:
        setattr(namespace, name, _on_cpu(getattr(torch, name)))
    namespace.cuda = _cuda_namespace()
    return namespace


def _cuda_namespace() -> ModuleType:
    namespace = ModuleType("torch.cuda")
    namespace.__dict__.update({name: value for name, value in vars(torch.cuda).items() if name != "__name__"})
    stand_ins = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "Stream": _Stream,  # stays a class: it is used in annotations
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda _: contextlib.nullcontext(),
    }
    namespace.__dict__.update(stand_ins)
    namespace.random = SimpleNamespace(
        get_rng_state=stand_ins["get_rng_state"], set_rng_state=stand_ins["set_rng_state"]
    )
    return namespace


class _Stream:
    """The CPU computes in order: nothing to wait for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def synchronize(self) -> None: ...


def _on_cpu(factory: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


class _CudaMethods(TorchFunctionMode):
    """Tensor methods as on CUDA: ``cuda()`` stays where it is, ``type()`` names the CUDA type."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _with_cuda_methods(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _CudaMethods():
            return function(*args, **kwargs)

    return call


def _wrap_functions() -> None:
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    for owner, name in (
        (LanguageModule, "setup_embeddings_and_output_layer"),
        (DistributedOptimizer, "__init__"),
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        (optimizer, "clip_grad_by_total_norm_fp32"),
    ):
        function = getattr(owner, name)
        if not hasattr(function, "__wrapped_for_cpu__"):
            wrapped = _with_cuda_methods(function)
            wrapped.__wrapped_for_cpu__ = True
            setattr(owner, name, wrapped)
    random._set_cuda_rng_state = _set_rng_state


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _megatron_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            yield module
