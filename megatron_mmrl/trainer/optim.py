"""Megatron's data-parallel wrapper and optimizer, from our configuration."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_mmrl.config.model import PARTS
from megatron_mmrl.config.optim import LrScale, OptimConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.models.parts import part_of

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer.module import MegatronModule


def wrap_data_parallel(chunks: list[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """DDP with gradients summed (not averaged) in float32: the loss already divides by a global number."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return [
        DistributedDataParallel(config=chunk.config, ddp_config=config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel], optim: OptimConfig, parallel: ParallelConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """Adam with float32 master weights; also restarts: fresh moments over the same parameters.

    Parameter groups (by weight decay and by the scale of the learning rate) are the same on every rank, in the same
    order, whatever parts of the model it holds. What is frozen is in none.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(config) | _rate_overrides(optim.lr_scale)
    optimizer = get_megatron_optimizer(config, chunks, overrides)
    for group in optimizer.param_groups:  # none for norms and biases; in Megatron its own schedule would do it
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Give every parameter group the learning rate ``lr``, times the scale of its part of the model."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def _rate_overrides(scales: LrScale) -> dict[ParamKey, dict[str, float]]:
    """Megatron's rule for each part whose rate differs."""
    return {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=part, fn=partial(_is_of, part))): {"lr_mult": scale}
        for part in PARTS
        if (scale := getattr(scales, part)) != 1.0
    }


def _is_of(part: str, _: torch.nn.Parameter, name: str) -> bool:
    return part_of(name.removeprefix("module.")) == part  # "module.": the data-parallel wrapper's
