"""An estimate as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_mmrl.config import Config
from megatron_mmrl.memory.estimate import GIB, RESERVE, Estimate, StageEstimate
from megatron_mmrl.memory.search import Proposal, problems

_PARTS: Mapping[str, str] = {
    "weights": "weights of the trainer",
    "reference": "weights of the reference model",
    "arena": "weights of the engine alone",
    "dummies": "weights that the engine starts with",
    "gradients": "gradients, float32",
    "optimizer": "optimizer state",
    "activations": "activations, log-probs",
    "images": "activations of the vision tower",
    "kv_cache": "KV cache",
    "engine": "engine: context, graphs, work space",
    "context": "trainer: context, communication",
}
_PHASES = ("start", "training", "rollout")


def show(config: Config, plan: Estimate) -> None:
    """Print what an estimate says of a layout."""
    console, worst = Console(), plan.worst
    table = Table(title=f"GiB of a GPU of pipeline stage {worst.stage}, where most is needed", title_justify="left")
    table.add_column("part", no_wrap=True)
    for phase in _PHASES:
        table.add_column(phase, justify="right")
    for part, words in _PARTS.items():
        sizes = [_phase(worst, phase).get(part, 0) for phase in _PHASES]
        if any(sizes):
            table.add_row(words, *(f"{size / GIB:.2f}" if size else "-" for size in sizes))
    table.add_section()
    table.add_row("together", *(f"{total(worst, phase) / GIB:.2f}" for phase in _PHASES))
    console.print(table)
    if len(plan.stages) > 1:
        peaks = ", ".join(f"{stage.stage}: {stage.peak / GIB:.1f}" for stage in plan.stages)
        print(f"Peak by pipeline stage, GiB: {peaks}")
    for line in _notes(config, plan):
        print(line)


def verdict(config: Config, plan: Estimate) -> list[str]:
    """Lines: fits with how much to spare, or why not and what helps."""
    wrong = problems(config, plan)
    if not wrong:
        return [f"fits: {plan.margin_bytes / GIB:.1f} GiB to spare"]
    return ["does not fit:", *(f"  {line}" for line in wrong), *(f"  {hint}" for hint in _hints(config, plan))]


def proposal_lines(near: Proposal | None, fast: Proposal | None) -> list[str]:
    """What would fit, as overrides of the configuration: the nearest, and the one of the lowest cost."""
    if near is None or fast is None:
        return ["No layout of these GPUs fits; use more of them, or larger ones."]
    lines = _proposal("nearest layout that fits", near)
    return lines if fast.overrides == near.overrides else [*lines, *_proposal("lowest cost (docs/memory.md)", fast)]


def as_json(
    config: Config, plan: Estimate | None, refusal: str | None, *, near: Proposal | None, fast: Proposal | None
) -> dict[str, Any]:
    """Everything as plain values, in bytes; ``refusal``: why there is no plan."""
    wrong = [refusal] if plan is None else problems(config, plan)
    return {
        "fits": not wrong,
        "problems": wrong,
        "layout": layout_line(config),
        "estimate": _plain(plan) if plan else None,
        **{
            name: {"overrides": list(found.overrides), "estimate": _plain(found.estimate)} if found else None
            for name, found in (("nearest", near), ("lowest_cost", fast))
        },
    }


def layout_line(config: Config) -> str:
    """Sizes of trainer and engines."""
    parallel, rollout = config.parallel, config.rollout
    chunks = parallel.virtual_pipeline_model_parallel_size
    return (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}"
        f"{f' (x {chunks} chunks)' if chunks else ''} x context {parallel.context_parallel_size} "
        f"x data {parallel.data_parallel_size} = {parallel.world_size} GPUs; "
        f"{rollout.num_engines} engine{'s' if rollout.num_engines > 1 else ''} of {rollout.tensor_parallel_size}"
    )


def total(stage: StageEstimate, phase: str) -> int:
    """Bytes of a phase, one of start, training and rollout."""
    return sum(_phase(stage, phase).values())


def _phase(stage: StageEstimate, phase: str) -> Mapping[str, int]:
    return {"start": stage.start, "training": stage.training, "rollout": stage.rollout}[phase]


def _notes(config: Config, plan: Estimate) -> Iterator[str]:
    machine, host = plan.machine, plan.host
    yield (
        f"Of {machine.gpu_memory_gib:g} GB programs have {machine.device_bytes / GIB:.1f} GiB; "
        f"{RESERVE:.0%} of that is kept free, which leaves {machine.limit_bytes / GIB:.1f}."
    )
    if plan.kv_tokens is not None:
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        yield (
            f"KV cache of an engine: {max(0, plan.kv_tokens):,} tokens, room for "
            f"{max(0, plan.kv_tokens) // longest:,} sequences of {longest:,}."
        )
    yield (
        f"Host memory of a node: {host.total / GIB:.0f} GiB (parked optimizer state {host.optimizer / GIB:.0f}, caches "
        f"up to {host.caches / GIB:.0f}, checkpoint {host.checkpoint / GIB:.0f}, processes {host.processes / GIB:.0f})."
    )


def _hints(config: Config, plan: Estimate) -> Iterator[str]:
    """Settings that make the part smaller which is too large, those that cost least first."""
    worst, limit = plan.worst, plan.machine.limit_bytes
    if max(total(worst, "start"), total(worst, "rollout")) > limit and config.rollout.max_total_tokens is None:
        yield "a smaller rollout.mem_fraction_static makes the KV cache smaller"
    if total(worst, "training") <= limit:
        return
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.trainer.micro_batch_tokens > longest:
        now = config.trainer.micro_batch_tokens
        yield f"trainer.micro_batch_tokens={longest} (now {now}) makes activations smaller"
    if config.model.recompute != "full":
        yield "model.recompute=full keeps a layer's input only, for a third more of computing"
    if config.algorithm.kl_coef > 0:
        yield "algorithm.kl_coef=0 needs no reference model"
    if "vision" not in config.model.freeze:
        yield "model.freeze=[vision] keeps nothing of the vision tower"


def _proposal(words: str, found: Proposal) -> list[str]:
    peak, margin = found.estimate.worst.peak / GIB, found.estimate.margin_bytes / GIB
    return [f"{words} ({peak:.1f} GiB at its peak, {margin:.1f} to spare):", f"  {' '.join(found.overrides)}"]


def _plain(plan: Estimate) -> dict[str, Any]:
    return {
        "limit_bytes": plan.machine.limit_bytes,
        "margin_bytes": plan.margin_bytes,
        "peak_bytes": plan.worst.peak,
        "kv_tokens_per_engine": plan.kv_tokens,
        "host_bytes_per_node": plan.host.total,
        "stages": [
            {"stage": stage.stage, **{phase: dict(_phase(stage, phase)) for phase in _PHASES}} for stage in plan.stages
        ],
    }
