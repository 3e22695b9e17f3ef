"""Bytes that a rank's parameters cost in training: weights, gradients and optimizer state. Pure."""

from __future__ import annotations

from megatron_mmrl.memory.model import ITEM_BYTES, DType
from megatron_mmrl.memory.parameters import GRADIENT_BYTES, STATE_BYTES, ParameterBytes


def rank_bytes(num_parameters: int, num_trained: int, dtype: DType, optimizer_ranks: int) -> ParameterBytes:
    """Bytes of a rank that holds ``num_parameters`` and trains ``num_trained`` of them.

    Weights and float32 gradients are whole on every rank; the distributed optimizer divides its state over the
    ``optimizer_ranks`` that hold the same parameters (data x context).
    """
    return ParameterBytes(
        weights=num_parameters * ITEM_BYTES[dtype],
        gradients=num_trained * GRADIENT_BYTES,
        optimizer=-(-num_trained * STATE_BYTES[dtype] // optimizer_ranks),
    )


def formula(dtype: DType, optimizer_ranks: int) -> str:
    """The same in words."""
    held = "two float32 moments" if dtype == "float32" else "float32 master copy and two moments"
    return (
        f"Bytes a parameter: weights {ITEM_BYTES[dtype]} ({dtype}); if trained, "
        f"gradient {GRADIENT_BYTES} (float32) and optimizer {STATE_BYTES[dtype]} / {optimizer_ranks} "
        f"({held}, over data x context ranks).\n"
        "Activations and the rounding of Megatron's buffers come on top."
    )
