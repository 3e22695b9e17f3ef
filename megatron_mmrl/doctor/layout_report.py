"""The report of ``mmrl doctor layout`` as text for people and as JSON for programs. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.doctor.coverage import Coverage
from megatron_mmrl.doctor.layout import LayoutReport, RankKind
from megatron_mmrl.doctor.layout_memory import formula

_GIB = 1 << 30
_SHOWN_PROBLEMS = 20
_HEADER = ("rank", "tensor", "pipeline", "parameters", "weights", "gradients", "optimizer", "total GiB", "layers", "")


def as_text(report: LayoutReport, name: str, model: ModelConfig) -> str:
    """Lines ending with the verdict; ``name``: what the user calls the model."""
    layout = report.layout
    size = layout.data * layout.context
    lines = [
        f"{name}: {report.num_parameters:,} parameters in {report.num_tensors} Hugging Face tensors, {model.dtype}"
        + (f", frozen: {', '.join(model.freeze)}" if model.freeze else ""),
        f"layout: {layout.world_size} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} "
        f"(x {layout.virtual_pipeline} chunks) x context {layout.context} x data {layout.data}",
    ]
    if size > 1:
        lines.append(
            f"The {size} ranks that differ only in their data or context index hold the same shards and are built once."
        )
    lines += ["", *_table([_HEADER, *map(_row, report.kinds)]), "", formula(model.dtype, size)]
    seconds = [kind.seconds for kind in report.kinds]
    lines.append(
        f"Built {len(seconds)} kinds of rank in {sum(seconds):.1f} s, "
        f"the slowest in {max(seconds):.1f} s, without memory for weights."
    )
    return "\n".join([*lines, "", *_verdict(report.coverage, layout.tensor)]) + "\n"


def as_json(report: LayoutReport, name: str, model: ModelConfig) -> dict[str, Any]:
    """The report as plain values."""
    return {"model": name, "dtype": model.dtype, "freeze": list(model.freeze), **dataclasses.asdict(report)}


def _row(kind: RankKind) -> tuple[str, ...]:
    sizes = kind.bytes
    return (
        _first_and_rest(kind.ranks),
        str(kind.tensor),
        str(kind.pipeline),
        f"{kind.num_parameters:,}",
        *(f"{size / _GIB:.2f}" for size in (sizes.weights, sizes.gradients, sizes.optimizer, sizes.total)),
        " | ".join(f"{layers[0]}-{layers[-1]}" if layers else "-" for layers in kind.layers),
        ", ".join(kind.parts),
    )


def _first_and_rest(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} (+{len(ranks) - 1})"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[:-2], widths, strict=False)]
        words = [cell.ljust(width) for cell, width in zip(row[-2:], widths[-2:], strict=True)]
        yield "  ".join([*numbers, *words]).rstrip()


def _verdict(coverage: Coverage | None, tensor: int) -> Iterator[str]:
    if coverage is None:
        yield "Coverage was not checked: it needs all ranks."
        return
    if coverage.problems:
        count = len(coverage.problems)
        yield f"The shards do NOT make up the model, {count} problem{'s' if count > 1 else ''}:"
        yield from (f"  {problem}" for problem in coverage.problems[:_SHOWN_PROBLEMS])
        if count > _SHOWN_PROBLEMS:
            yield f"  and {count - _SHOWN_PROBLEMS} more"
        return
    yield f"Proved: the shards hold every number of all {coverage.num_tensors} tensors exactly once, but for"
    yield f"  {coverage.replicated:,} parameters (vision tower, norms) that all {tensor} tensor-parallel ranks hold,"
    yield f"  {coverage.copied:,} of a second copy of the tied embedding,"
    yield f"  {coverage.padding:,} of padding rows of the vocabulary."
