"""How a rollout is cut into optimizer updates and forward passes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mmrl.config.checks import at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Keys under ``trainer.``"""

    mini_batch_sequences: int | None = None
    """Sequences per optimizer update, over all data-parallel ranks; unset: the whole rollout."""
    micro_batch_tokens: int = 8192
    """Token budget of one forward pass of one replica; its context-parallel ranks share them."""
    micro_batch_sequences: int | None = None
    """At most so many sequences in one forward pass; unset: only the token budget binds."""
    packing: bool = True
    """Put sequences one after the other without padding; false: one row each, padded to the longest."""
    logprob_chunk_tokens: int = 1024
    """Log-probs and entropy are computed so many tokens at a time: the full logits never exist."""

    def __post_init__(self) -> None:
        if self.mini_batch_sequences is not None:
            at_least("trainer.mini_batch_sequences", self.mini_batch_sequences, 1)
        at_least("trainer.micro_batch_tokens", self.micro_batch_tokens, 1)
        if self.micro_batch_sequences is not None:
            at_least("trainer.micro_batch_sequences", self.micro_batch_sequences, 1)
        at_least("trainer.logprob_chunk_tokens", self.logprob_chunk_tokens, 1)
