"""The parts of a model by the names of its tensors, and freezing them.

Names are those of the published checkpoints (see ``hf_io.py``), which every model here begins alike: ``visual.`` for
the tower, ``visual.merger.`` for its last layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megatron_mmrl.config.checks import require
from megatron_mmrl.config.model import PARTS, PATTERN

if TYPE_CHECKING:
    from megatron_mmrl.models.qwen2_5_vl.model import Qwen25VL


def part_of(name: str) -> str:
    """The part (``vision``, ``merger`` or ``language``) of a tensor's or a local parameter's name."""
    if name.startswith("visual.merger."):
        return "merger"
    return "vision" if name.startswith("visual.") else "language"


def frozen_names(names: Sequence[str], freeze: Sequence[str]) -> set[str]:
    """Those of ``names`` that ``model.freeze`` freezes.

    Args:
        names: all tensors of the model.
        freeze: parts, or ``re:`` and an expression that matches whole names.

    Raises:
        ValueError: an entry matches no tensor, or together they match all.
    """
    frozen: set[str] = set()
    for index, entry in enumerate(freeze):
        if entry in PARTS:
            matched = {name for name in names if part_of(name) == entry}
        else:
            expression = re.compile(entry.removeprefix(PATTERN))
            matched = {name for name in names if expression.fullmatch(name)}
        require(
            bool(matched),
            f"model.freeze[{index}]={entry!r} matches no tensor of the model (an expression must match the whole "
            f"name); there are {', '.join(_shapes_of(names))}, where N is any number",
        )
        frozen |= matched
    require(frozen < set(names), f"model.freeze={list(freeze)} matches all {len(names)} tensors: nothing would train")
    return frozen


def freeze_parameters(chunks: Sequence[Qwen25VL], freeze: Sequence[str], names: Sequence[str]) -> None:
    """Switch the gradients of the matching parameters off; before Megatron's data-parallel wrapper is made.

    Args:
        chunks: this rank's part of the model; together the ranks hold ``names``.
        freeze: ``model.freeze``.
        names: all tensors of the checkpoint.

    Raises:
        ValueError: see ``frozen_names``; or an entry matches some but not all tensors that Megatron keeps in one.
    """
    frozen = frozen_names(names, freeze)
    for chunk in chunks:
        table = chunk.weight_table()
        for local, parameter in chunk.named_parameters():
            entry = table[local]
            chosen = [name for name in entry.hf_names if name in frozen]
            require(
                len(chosen) in (0, len(entry.hf_names)),
                f"model.freeze={list(freeze)} matches {', '.join(chosen)}, but Megatron keeps "
                f"{', '.join(entry.hf_names)} in one tensor: freeze all of them or none",
            )
            if chosen:
                parameter.requires_grad_(requires_grad=False)


def _shapes_of(names: Iterable[str]) -> list[str]:
    """Names with their numbers left out, each once."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names})
