"""Bytes per GPU of a run, by part: at its start, while it trains and while it generates, on each pipeline stage."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mmrl.config import Config
from megatron_mmrl.memory.activations import ActivationBytes, stage_activations
from megatron_mmrl.memory.engine import CONTEXT_BYTES, EngineBytes, engine_bytes
from megatron_mmrl.memory.host import HostBytes, host_bytes
from megatron_mmrl.memory.model import ITEM_BYTES, DType, ModelSizes, model_sizes
from megatron_mmrl.memory.parameters import ParameterBytes, parameter_bytes, stage_parameters
from megatron_mmrl.memory.workload import setting_of, worst_workload
from megatron_mmrl.models.registry import read_hf_config
from megatron_mmrl.parallel.layout import ParallelLayout, check_layout
from megatron_mmrl.reshard.between import planner_of
from megatron_mmrl.reshard.plan import Planner
from megatron_mmrl.reshard.spec import arena_layout

GIB = 1 << 30
_FLOAT32 = 4
USABLE = 0.985
"""Of the GiB in a GPU's name: an H100 of 80 has 79.1 for programs, an H200 of 141 has 139.8 (torch's total_memory)."""
RESERVE = 0.05
"""Assumed: of those, what torch's allocator cannot use (fragments), and what is not in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs to plan for."""

    gpus: int
    gpus_per_node: int
    gpu_memory_gib: float
    """As in the name of the GPU: 80, 141."""

    @property
    def device_bytes(self) -> int:
        """That programs can have."""
        return int(self.gpu_memory_gib * GIB * USABLE)

    @property
    def limit_bytes(self) -> int:
        """That a plan may fill."""
        return int(self.device_bytes * (1 - RESERVE))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """Of the GPU of one pipeline stage that needs most."""

    stage: int
    parameters: ParameterBytes
    activations: ActivationBytes
    arena: int
    """The engine's weights that are not the trainer's own memory."""
    reference: int
    engine: EngineBytes | None
    """None where no engine runs."""
    dummies: int
    """Weights that an engine has before the trainer's are attached."""
    masters: int
    """Optimizer state before the first update: the float32 copies of bfloat16 weights."""

    @property
    def start(self) -> Mapping[str, int]:
        """By part, before the first hand-over: the engine has its KV cache and its dummies, the trainer its buffers."""
        return {
            **self._always(),
            "dummies": self.dummies if self.engine else 0,
            "gradients": self.parameters.gradients,
            "optimizer": self.masters,
            "kv_cache": self.engine.kv_cache if self.engine else 0,
        }

    @property
    def training(self) -> Mapping[str, int]:
        """By part; what the engine does not give back is among it."""
        return {
            **self._always(),
            "gradients": self.parameters.gradients,
            "optimizer": self.parameters.optimizer,
            "activations": self.activations.kept + self.activations.work,
            "images": self.activations.images,
        }

    @property
    def rollout(self) -> Mapping[str, int]:
        """By part: gradients are dropped, optimizer state is on the host."""
        return {**self._always(), "kv_cache": self.engine.kv_cache if self.engine else 0}

    @property
    def peak(self) -> int:
        """The largest of the three."""
        return max(sum(phase.values()) for phase in (self.start, self.training, self.rollout))

    def _always(self) -> Mapping[str, int]:
        return {
            "weights": self.parameters.weights,
            "reference": self.reference,
            "arena": self.arena,
            "engine": self.engine.overhead if self.engine else 0,
            "context": CONTEXT_BYTES,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of a whole run."""

    machine: Machine
    stages: tuple[StageEstimate, ...]
    host: HostBytes
    """Of the node that needs most."""

    @property
    def worst(self) -> StageEstimate:
        """The stage whose GPUs need most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def margin_bytes(self) -> int:
        """Left of the limit, on the GPU that needs most; below 0: too much."""
        return self.machine.limit_bytes - self.worst.peak

    @property
    def kv_tokens(self) -> int | None:
        """Of one engine's cache."""
        sizes = [stage.engine.kv_tokens for stage in self.stages if stage.engine]
        return min(sizes, default=None)

    def kv_tokens_at(self, share: float, own: float) -> int | None:
        """``kv_tokens`` if ``rollout.mem_fraction_static`` were ``share`` in place of ``own``."""
        engine = next((stage.engine for stage in self.stages if stage.engine), None)
        if engine is None:
            return None
        return engine.kv_tokens + int((share - own) * (self.machine.device_bytes - CONTEXT_BYTES)) // engine.token


def estimate(config: Config, machine: Machine, planner: Planner | None = None) -> Estimate:
    """Plan a run; ``config.model.path`` is a directory with a ``config.json``, nothing else of it is read.

    Args:
        config: its parallel sizes make up ``machine.gpus``.
        planner: of this layout and these engines, where one is there.

    Raises:
        ValueError: the model cannot be cut so, engines and trainer do not fit together, or an engine spans nodes.
    """
    hf_config = read_hf_config(config.model.path)
    check_layout(hf_config, config)
    return _estimate(config, machine, model_sizes(hf_config), planner or planner_of(config, machine.gpus_per_node))


def least_estimate(config: Config, machine: Machine) -> Estimate:
    """As if the engine shared all of its weights: quick, and never more than ``estimate`` says. Raises as that does."""
    hf_config = read_hf_config(config.model.path)
    check_layout(hf_config, config)
    return _estimate(config, machine, model_sizes(hf_config), None)


def _estimate(config: Config, machine: Machine, model: ModelSizes, planner: Planner | None) -> Estimate:
    layout = ParallelLayout.from_config(config.parallel)
    held = stage_parameters(config.model, config.parallel)
    item, load = ITEM_BYTES[config.model.dtype], worst_workload(config, model)
    setting = setting_of(config, "transformer_engine")
    own = _engine_weights(config.model.path, config.rollout.tensor_parallel_size, config.model.dtype)
    whole = engine_bytes(model, config.rollout, config.model.dtype, weights=own, device_bytes=machine.device_bytes)
    arenas = _arenas(config, planner, own, item)
    stages = []
    for part in held:
        sharers = layout.data * layout.context if config.parallel.use_distributed_optimizer else 1
        stages.append(
            StageEstimate(
                stage=part.stage,
                parameters=parameter_bytes(
                    part, config.model.dtype, sharers, distributed=config.parallel.use_distributed_optimizer
                ),
                activations=stage_activations(model, setting, load, part.stage),
                arena=arenas.get(part.stage, 0),
                reference=item * part.elements if config.algorithm.kl_coef > 0 else 0,
                engine=whole if planner is None or part.stage in arenas else None,
                dummies=own,
                masters=_FLOAT32 * part.trained // sharers if config.model.dtype == "bfloat16" else 0,
            )
        )
    nodes = max(1, layout.world_size // machine.gpus_per_node)
    host = host_bytes(
        config,
        ranks=layout.world_size // nodes,
        engines=-(-config.rollout.num_engines // nodes),
        optimizer=max(stage.parameters.optimizer for stage in stages),
        largest=4 * max(part.largest for part in held),
    )
    return Estimate(machine=machine, stages=tuple(stages), host=host)


def _arenas(config: Config, planner: Planner | None, own: int, item: int) -> dict[int, int]:
    """Largest arena of each pipeline stage on whose GPUs engines run; ``own``: bytes of an engine rank's weights."""
    if planner is None:
        return {}
    layout, known, largest = planner.trainer.layout, {}, dict[int, int]()
    for device, rank in planner.runs.items():
        at = layout.coordinates(device)
        kind = (at.pipeline, at.tensor, rank)
        if kind not in known:
            shares = config.reshard.method == "in_place"
            known[kind] = arena_layout(planner, rank, planner.incoming(device), item)[1] if shares else own
        largest[at.pipeline] = max(largest.get(at.pipeline, 0), known[kind])
    return largest


@functools.lru_cache(maxsize=64)
def _engine_weights(path: str, tensor: int, dtype: DType) -> int:
    """Bytes of the weights of an engine rank, were they all its own."""
    from megatron_mmrl.models.registry import engine_parameters, tensor_shapes

    shapes = tensor_shapes(Path(path))
    sizes = (
        entry.rule.place([shapes[name] for name in entry.hf_names], *((0, tensor) if entry.divided else (0, 1))).size
        for entry in engine_parameters(Path(path), whole_encoder=False)
    )
    return ITEM_BYTES[dtype] * sum(sizes)
