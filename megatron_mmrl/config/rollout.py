"""How completions are sampled. Names are SGLang's where it has one."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.config.checks import at_least, require, within


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Keys under ``rollout.``"""

    num_engines: int = 1
    """SGLang servers; each is started by one trainer rank, its leader."""
    tensor_parallel_size: int = 1
    """Tensor-parallel size of each engine."""
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    """Completions per prompt: the group of GRPO."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Training refuses anything but 1: the trainer could not reproduce the engine's log-probs."""
    top_k: int = -1
    """Training refuses anything but -1 (off), for the same reason."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the response already holds are divided by this (multiplied where negative); 1: off."""
    max_response_tokens: int = 64
    deterministic: bool = False
    """Make sampling a function of (seed, step, prompt, sample index); slower. See docs/determinism.md."""
    request_timeout_s: float = 120.0
    """Limit of every request to the engine."""
    startup_timeout_s: float = 180.0
    """Limit for an engine to become ready."""
    max_engine_restarts: int = 3
    """So many times in a run an engine that has died is started again, given the weights and its prompts."""
    max_total_tokens: int | None = None
    """KV cache size in tokens; unset: SGLang decides."""
    mem_fraction_static: float = 0.6
    """Share of the device's memory for weights and KV cache (SGLang's meaning)."""
    max_running_requests: int = 256
    mm_enable_dp_encoder: bool = False
    """Every rank of an engine holds the whole vision tower, and encodes a share of the images (SGLang's option)."""
    weight_bucket_bytes: int = 1 << 29
    """With reshard.method=reference, weights travel in buckets of at most this size (a larger tensor alone)."""

    def __post_init__(self) -> None:
        for key in (
            "num_engines",
            "tensor_parallel_size",
            "prompts_per_step",
            "samples_per_prompt",
            "max_response_tokens",
            "max_running_requests",
            "weight_bucket_bytes",
        ):
            at_least(f"rollout.{key}", getattr(self, key), 1)
        at_least("rollout.max_engine_restarts", self.max_engine_restarts, 0)
        require(self.temperature > 0, f"rollout.temperature={self.temperature}: must be above 0 to train")
        require(
            0 < self.repetition_penalty <= 2,
            f"rollout.repetition_penalty={self.repetition_penalty}: must be above 0 and at most 2",
        )
        within("rollout.mem_fraction_static", self.mem_fraction_static, 0.01, 0.99)
        require(
            self.top_p == 1.0 and self.top_k == -1,
            f"rollout.top_p={self.top_p}, rollout.top_k={self.top_k}: training needs top_p=1 and top_k=-1, because "
            "SGLang returns log-probs of the full softmax and not of the cut one",
        )
        for key in ("request_timeout_s", "startup_timeout_s"):
            require(getattr(self, key) > 0, f"rollout.{key}={getattr(self, key)}: must be above 0")
