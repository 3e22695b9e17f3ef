"""The whole configuration and the checks that need more than one part of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mmrl.config.algorithm import AlgorithmConfig
from megatron_mmrl.config.checks import require
from megatron_mmrl.config.cluster import ClusterConfig
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.config.model import ModelConfig
from megatron_mmrl.config.optim import OptimConfig
from megatron_mmrl.config.parallel import ParallelConfig
from megatron_mmrl.config.reshard import ReshardConfig
from megatron_mmrl.config.reward import RewardConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.config.run import RunConfig
from megatron_mmrl.config.supervised import SupervisedConfig
from megatron_mmrl.config.trainer import TrainerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All keys. YAML files hold only what differs from these defaults."""

    model: ModelConfig
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reshard: ReshardConfig = field(default_factory=ReshardConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        world, engines = self.parallel.world_size, self.rollout.num_engines
        require(
            world % engines == 0,
            f"rollout.num_engines={engines} does not divide the {world} trainer processes "
            f"(product of the parallel sizes); use one of {_divisors(world)}",
        )
        sequences = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        mini_batch = self.trainer.mini_batch_sequences
        require(
            mini_batch is None or mini_batch <= sequences,
            f"trainer.mini_batch_sequences={mini_batch} exceeds the {sequences} sequences of a step "
            f"(rollout.prompts_per_step={self.rollout.prompts_per_step} x "
            f"rollout.samples_per_prompt={self.rollout.samples_per_prompt})",
        )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        require(
            self.trainer.micro_batch_tokens >= longest,
            f"trainer.micro_batch_tokens={self.trainer.micro_batch_tokens} cannot hold one sequence of up to "
            f"{longest} tokens (data.max_prompt_tokens={self.data.max_prompt_tokens} + "
            f"rollout.max_response_tokens={self.rollout.max_response_tokens})",
        )


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
