"""Which library's Adam and attention a policy really uses, read from the objects that were built.

Megatron takes Transformer Engine's Adam, else apex's, else torch's, by what can be imported, without a word; layers are
Transformer Engine's where it is there (``parallel/layers.py``). A slow run should not leave one guessing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from megatron_mmrl.parallel.attention import CausalAttention

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


def kernels_in_use(chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> str:
    """One line about this rank: ``Adam: AdamW of torch 2.13.0; attention: ...; vision attention: ...``.

    Args:
        chunks: of the model, as they are trained.
        optimizer: Megatron's, over their parameters.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    return "; ".join(
        (
            f"Adam: {_listed(_of_library(type(adam)) for adam in _adams(optimizer))}",
            f"attention: {_listed(_attention(m.core_attention) for m in modules if hasattr(m, 'core_attention'))}",
            f"vision attention: {_listed(_vision(m) for m in modules if _is_vision_attention(m))}",
        )
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "none on this rank"


def _adams(optimizer: MegatronOptimizer) -> Iterator[object]:
    """What computes inside Megatron's wrappers; nothing where all that this rank holds is frozen."""
    for wrapper in getattr(optimizer, "chained_optimizers", (optimizer,)):
        if wrapper.optimizer is not None:
            yield wrapper.optimizer


def _attention(module: nn.Module) -> str:
    if isinstance(module, CausalAttention):
        return f"scaled_dot_product_attention of torch {importlib.metadata.version('torch')}"
    kinds = type(module).__mro__  # Megatron's own class wraps Transformer Engine's
    return _of_library(next((kind for kind in kinds if kind.__module__.startswith("transformer_engine.")), kinds[0]))


def _is_vision_attention(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.") and type(module).__name__.endswith("VisionAttention")


def _vision(module: nn.Module) -> str:
    return f"{module.config._attn_implementation} of transformers {importlib.metadata.version('transformers')}"


def _of_library(kind: type) -> str:
    library = kind.__module__.partition(".")[0]
    owners = importlib.metadata.packages_distributions().get(library, [])
    versions = sorted({importlib.metadata.version(owner) for owner in owners})  # Transformer Engine has three, alike
    return " ".join((f"{kind.__qualname__} of {library}", *versions))
