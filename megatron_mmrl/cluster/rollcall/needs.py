"""What a run needs, in bytes: what its parameters cost, which is certain, and on GPUs the least that is estimated."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.config import Config
from megatron_mmrl.memory.estimate import GIB, USABLE, Machine, least_estimate
from megatron_mmrl.memory.parameters import parameter_bytes, stage_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Lower bounds; the estimated ones hold to some per cent."""

    parameters: int  # of the rank of the stage that needs most: weights, gradients, optimizer state
    shared_weights: int  # of such a rank, in shared memory where there is no GPU
    checkpoint: int  # one, of all ranks together
    export: int  # the model in Hugging Face format
    kept_checkpoints: int
    gpu_peak: int = 0  # estimated, on one GPU; 0: there is none
    host: int = 0  # estimated, of all ranks of a node


def needs_of(config: Config, *, gpu_bytes: int | None, ranks_per_node: int) -> Needs:
    """Needs of ``config``, whose ``model.path`` can be read.

    Args:
        config: the run's configuration.
        gpu_bytes: memory of a GPU; None on CPUs.
        ranks_per_node: of the first node.

    Raises:
        ValueError: the model cannot be cut so.
    """
    parallel, dtype = config.parallel, config.model.dtype
    sharers = parallel.data_parallel_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    stages = [
        parameter_bytes(stage, dtype, sharers, distributed=parallel.use_distributed_optimizer)
        for stage in stage_parameters(config.model, parallel)
    ]
    weights = parallel.tensor_model_parallel_size * sum(stage.weights for stage in stages)
    optimizer = parallel.tensor_model_parallel_size * sum(stage.optimizer for stage in stages) * sharers
    machine = gpu_bytes and Machine(
        gpus=parallel.world_size, gpus_per_node=ranks_per_node, gpu_memory_gib=gpu_bytes / GIB / USABLE
    )
    estimate = least_estimate(config, machine) if machine else None
    return Needs(
        parameters=max(stage.weights + stage.gradients + stage.optimizer for stage in stages),
        shared_weights=max(stage.weights for stage in stages) if config.reshard.method == "in_place" else 0,
        checkpoint=weights + optimizer,
        export=weights if config.run.export_hf else 0,
        kept_checkpoints=config.run.keep_checkpoints,
        gpu_peak=estimate.worst.peak if estimate else 0,
        host=estimate.host.total if estimate else 0,
    )
