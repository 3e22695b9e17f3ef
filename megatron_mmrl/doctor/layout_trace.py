"""Which blocks of a checkpoint's tensors a row of the weight table puts into a shard."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mmrl.config.checks import require
from megatron_mmrl.doctor.coverage import Piece, Role
from megatron_mmrl.parallel.geometry import shard_placement
from megatron_mmrl.parallel.sharding import Replicated, WeightEntry


def trace(
    entry: WeightEntry, shapes: Mapping[str, tuple[int, ...]], rank: int, size: int
) -> tuple[Role, tuple[Piece, ...], int]:
    """What ``entry`` puts into a parameter of tensor-parallel rank ``rank`` of ``size``.

    Args:
        shapes: of every tensor of the checkpoint, by its original name.

    Returns:
        how it is held, the blocks, and how many numbers of the shard are padding.

    Raises:
        ValueError: the entry names a tensor that does not exist, or cuts it in a way that cannot be traced.
    """
    unknown = [name for name in entry.hf_names if name not in shapes]
    require(not unknown, f"the weight table wants {unknown}, which the Hugging Face model does not have")
    placement = shard_placement(entry.rule, tuple(shapes[name] for name in entry.hf_names), rank, size)
    role: Role = "replica" if isinstance(entry.rule, Replicated) else "part" if entry.exported else "copy"
    pieces = tuple(
        Piece(
            name=entry.hf_names[piece.tensor],
            rows=(piece.of.top, piece.of.bottom),
            columns=(piece.of.left, piece.of.right),
        )
        for piece in placement.pieces
    )
    return role, pieces, placement.size - sum(piece.size for piece in pieces)
