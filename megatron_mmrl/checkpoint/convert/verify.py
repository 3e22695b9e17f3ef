"""Two checkpoints read side by side, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mmrl.checkpoint.convert.stream import Buffer, Progress, blocks
from megatron_mmrl.config.checks import require
from megatron_mmrl.models.hf_io import TensorReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was found where no tensor differs in a bit, which is all that is accepted."""

    num_tensors: int
    largest_difference: float


def compare(left: TensorReader, right: TensorReader, progress: Progress) -> Comparison:
    """Read both sides whole.

    Raises:
        ValueError: they have other tensors, or one differs in dtype, shape or a bit; with the largest difference.
    """
    names = sorted(left.names)
    require(names == sorted(right.names), f"{set(names) ^ set(right.names)} is on one side only")
    worst, worst_name, differing = 0.0, "", []
    for name, difference, same in _differences(left, right, names):
        if not same:
            differing.append(name)
        if difference >= worst:
            worst, worst_name = difference, name
        progress(f"verify {name}", left[name].nbytes)
    require(
        not differing,
        f"{len(differing)} tensors differ, such as {differing[0] if differing else ''}; the largest difference is "
        f"{worst:g} in {worst_name}",
    )
    return Comparison(num_tensors=len(names), largest_difference=worst)


def _differences(left: TensorReader, right: TensorReader, names: Sequence[str]) -> Iterator[tuple[str, float, bool]]:
    """For each name: the largest difference, and whether all bits are the same."""
    buffers = (Buffer(), Buffer())
    for name in names:
        a, b = left[name], right[name]
        require(
            (a.shape, a.dtype) == (b.shape, b.dtype),
            f"tensor {name} is {a.dtype} {a.shape} on one side and {b.dtype} {b.shape} on the other",
        )
        worst, same = 0.0, True
        for rows in blocks(a.shape, a.nbytes):
            x, y = (buffer.take((rows.stop - rows.start, *a.shape[1:]), a.dtype) for buffer in buffers)
            a.read_into(x, rows)
            b.read_into(y, rows)
            if not _same_bits(x, y):
                worst, same = max(worst, float((x.double() - y.double()).abs().max())), False
        yield name, worst, same


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
