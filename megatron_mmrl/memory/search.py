"""Layouts that fit a machine: the nearest to a configuration, or the fastest. Pure.

Nearest is: the fewest keys changed, then the lowest ``cost``. The number of replicas and of engines follow from the
other sizes, so that all GPUs train and all generate, and do not count as changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_mmrl.config import Config
from megatron_mmrl.memory.engine import CONTEXT_BYTES
from megatron_mmrl.memory.estimate import Estimate, Machine, StageEstimate, estimate, least_estimate
from megatron_mmrl.memory.model import ITEM_BYTES
from megatron_mmrl.memory.parameters import GRADIENT_BYTES, STATE_BYTES, total_parameters
from megatron_mmrl.memory.workload import longest_sequence, rollout_sequences, sequences_per_update
from megatron_mmrl.reshard.between import planner_of

KV_SEQUENCES = 16
"""An engine's KV cache should hold so many of the longest sequences at least."""
_CONTEXTS, _CHUNKS = (1, 2, 4, 8), (None, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A configuration that fits."""

    config: Config
    estimate: Estimate
    overrides: tuple[str, ...]
    """``key=value`` of what differs from the configuration that was asked about, dependent numbers included."""


def problems(config: Config, plan: Estimate) -> list[str]:
    """Why a plan does not fit, in words; [] when it does."""
    found = []
    worst, machine = plan.worst, plan.machine
    for name, phase in (("the start", worst.start), ("training", worst.training), ("rollout", worst.rollout)):
        if (total := sum(phase.values())) > machine.limit_bytes:
            largest = max(phase, key=lambda part: phase[part])
            found.append(
                f"{name} needs {total / 2**30:.1f} GiB of a GPU of stage {worst.stage}, "
                f"{machine.limit_bytes / 2**30:.1f} can be used; "
                f"the largest part is {largest} with {phase[largest] / 2**30:.1f}"
            )
    wanted = wanted_kv_tokens(config)
    if plan.kv_tokens is not None and plan.kv_tokens < wanted:
        found.append(
            f"an engine's KV cache holds {max(0, plan.kv_tokens):,} tokens, fewer than {wanted:,} "
            f"({KV_SEQUENCES} sequences of {longest_sequence(config):,}, or all that it is given)"
        )
    return found


def wanted_kv_tokens(config: Config) -> int:
    """See ``KV_SEQUENCES``; no more than an engine's share of a step."""
    share = -(-rollout_sequences(config) // config.rollout.num_engines)
    return min(KV_SEQUENCES, share) * longest_sequence(config)


def cost(config: Config) -> float:
    """Time of a step against an ideal one, by rule of thumb; 1.0 is the least.

    Training: a pipeline's bubble, (stages - 1) / (micro-batches x chunks), the passes made again by full recomputation
    (a third), 2 % for each further tensor-parallel rank and 5 % for each further context-parallel one. Rollout: 2 % for
    each further rank of an engine, and 5 % where weights have to be moved because the engine's tensor size is another.
    """
    parallel, rollout = config.parallel, config.rollout
    sequences = max(1, sequences_per_update(config) // parallel.data_parallel_size)
    microbatches = max(1.0, sequences * longest_sequence(config) / 2 / config.trainer.micro_batch_tokens)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    bubble = (parallel.pipeline_model_parallel_size - 1) / (microbatches * chunks)
    training = (1 + bubble) * (4 / 3 if config.model.recompute == "full" else 1)
    training *= (1 + 0.02 * (parallel.tensor_model_parallel_size - 1)) * (
        1 + 0.05 * (parallel.context_parallel_size - 1)
    )
    moved = rollout.tensor_parallel_size != parallel.tensor_model_parallel_size
    generation = 1 + 0.02 * (rollout.tensor_parallel_size - 1) + 0.05 * moved
    idle = max(1.0, parallel.data_parallel_size / max(1, sequences_per_update(config)))
    return (training * idle + generation) / 2


def nearest(config: Config, machine: Machine, *, keep: bool = True) -> Proposal | None:
    """The nearest layout that fits ``machine``, or None; ``keep=False``: the one of the lowest cost."""
    candidates = sorted(
        _candidates(config, machine), key=lambda one: (len(_changes(config, one)) if keep else 0, cost(one))
    )
    every, trained = total_parameters(config.model)
    for candidate in candidates:
        if _least_bytes(candidate, every, trained) > machine.limit_bytes:
            continue
        if (found := _fitted(candidate, machine)) is not None:
            return Proposal(config=found[0], estimate=found[1], overrides=_overrides(config, found[0]))
    return None


def _candidates(config: Config, machine: Machine) -> Iterator[Config]:
    tensors = [n for n in range(1, machine.gpus_per_node + 1) if machine.gpus % n == 0]
    stages = [n for n in range(1, min(machine.gpus, 16) + 1) if machine.gpus % n == 0]
    contexts = sorted({*_CONTEXTS, config.parallel.context_parallel_size})
    chunks = dict.fromkeys((config.parallel.virtual_pipeline_model_parallel_size, *_CHUNKS))
    passes = dict.fromkeys((config.model.recompute, "none", "full"))
    for tensor, stage, context in itertools.product(tensors, stages, contexts):
        if machine.gpus % (tensor * stage * context):
            continue
        for chunk, engine, recompute in itertools.product(chunks if stage > 1 else (None,), tensors, passes):
            yield replace(
                config,
                model=replace(config.model, recompute=recompute),
                parallel=replace(
                    config.parallel,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=stage,
                    virtual_pipeline_model_parallel_size=chunk,
                    context_parallel_size=context,
                    data_parallel_size=machine.gpus // (tensor * stage * context),
                ),
                rollout=replace(config.rollout, tensor_parallel_size=engine, num_engines=machine.gpus // engine),
            )


def _least_bytes(config: Config, every: int, trained: int) -> int:
    """No plan of ``config`` needs less: the parameters' bytes, were they spread evenly."""
    parallel, dtype = config.parallel, config.model.dtype
    ranks = parallel.data_parallel_size * parallel.context_parallel_size
    state = STATE_BYTES[dtype] / (ranks if parallel.use_distributed_optimizer else 1)
    cuts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return int((ITEM_BYTES[dtype] * every + (GRADIENT_BYTES + state) * trained) / cuts)


def _fitted(config: Config, machine: Machine) -> tuple[Config, Estimate] | None:
    """``config`` with a share for the engine that fits, and its estimate; None when there is none."""
    try:
        if _with_share(config, least_estimate(config, machine)) is None:
            return None
        planner = planner_of(config, machine.gpus_per_node)
    except ValueError:  # the model cannot be cut so, or an engine would span nodes
        return None
    plan = estimate(config, machine, planner)
    found = _with_share(config, plan)
    return None if found is None else (found, plan if found == config else estimate(found, machine, planner))


def _with_share(config: Config, plan: Estimate) -> Config | None:
    """``config`` as it is if ``plan``, its estimate, fits; or with the ``mem_fraction_static`` that makes it fit."""
    if not problems(config, plan):
        return config
    share = _largest_share(config, plan)
    if share is None or any(sum(stage.training.values()) > plan.machine.limit_bytes for stage in plan.stages):
        return None
    tokens = plan.kv_tokens_at(share, config.rollout.mem_fraction_static)
    if tokens is not None and tokens < wanted_kv_tokens(config):
        return None
    return replace(config, rollout=replace(config.rollout, mem_fraction_static=share))


def _largest_share(config: Config, plan: Estimate) -> float | None:
    """The largest ``rollout.mem_fraction_static``, in hundredths, at which start and rollout fit; None: there is none.

    Both grow by the device's memory times the share.
    """
    if config.rollout.max_total_tokens is not None:
        return None
    own = config.rollout.mem_fraction_static
    room = plan.machine.limit_bytes - max(_with_cache(stage) for stage in plan.stages)
    share = math.floor(100 * (own + room / (plan.machine.device_bytes - CONTEXT_BYTES))) / 100
    return min(share, 0.9) if share >= 0.01 else None


def _with_cache(stage: StageEstimate) -> int:
    """The most that a GPU needs while it has a KV cache."""
    return max(sum(stage.start.values()), sum(stage.rollout.values()))


_KEYS = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "rollout.tensor_parallel_size",
    "rollout.mem_fraction_static",
    "model.recompute",
)
_DEPENDENT = ("parallel.data_parallel_size", "rollout.num_engines")


def _changes(config: Config, other: Config) -> list[str]:
    return [key for key in _KEYS if value_of(config, key) != value_of(other, key)]


def _overrides(config: Config, other: Config) -> tuple[str, ...]:
    changed = [key for key in (*_KEYS, *_DEPENDENT) if value_of(config, key) != value_of(other, key)]
    return tuple(f"{key}={'null' if (value := value_of(other, key)) is None else value}" for key in changed)


def value_of(config: Config, key: str) -> Any:
    """What a dotted key is set to."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
