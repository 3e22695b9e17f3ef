"""How the trainer's ranks are laid out. Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.config.checks import at_least, require


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Keys under ``parallel.``"""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule: micro-batches in multiples of the stages); unset: one."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of every sequence, for long ones; sequences are padded to a multiple of twice it."""
    data_parallel_size: int = 1
    """Replicas; the product of all sizes is the number of trainer processes."""
    sequence_parallel: bool = True
    """Split activations along the sequence between tensor-parallel ranks (no effect at tensor size 1)."""
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    timeout_s: int = 3600
    """A collective that takes longer ends the run. Keep it above cluster.timeout_s, which says whose fault it is."""

    def __post_init__(self) -> None:
        for key in ("tensor_model", "pipeline_model", "context", "data"):
            name = f"{key}_parallel_size"
            at_least(f"parallel.{name}", getattr(self, name), 1)
        if self.virtual_pipeline_model_parallel_size is not None:
            at_least("parallel.virtual_pipeline_model_parallel_size", self.virtual_pipeline_model_parallel_size, 2)
            require(
                self.pipeline_model_parallel_size > 1,
                "parallel.virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size} needs parallel.pipeline_model_parallel_size >= 2, "
                f"got {self.pipeline_model_parallel_size}",
            )
        require(
            not self.overlap_param_gather or self.overlap_grad_reduce,
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true (Megatron's rule)",
        )

    @property
    def world_size(self) -> int:
        """Number of trainer processes."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )
