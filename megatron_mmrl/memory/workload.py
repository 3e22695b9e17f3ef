"""The most that an update can ask of a replica, from the configuration: the micro-batch that memory has to hold."""

from __future__ import annotations

from megatron_mmrl.config import Config
from megatron_mmrl.memory.activations import Layers, Setting, Workload
from megatron_mmrl.memory.model import ModelSizes
from megatron_mmrl.parallel.layout import ParallelLayout
from megatron_mmrl.trainer.plan import Multiples


def worst_workload(config: Config, model: ModelSizes) -> Workload:
    """A full micro-batch, nearly all of it responses for the log-probs, and nearly all of it images for the tower.

    Each image is taken to be different, as large as ``data.max_pixels`` and ``data.max_prompt_tokens`` allow, and to be
    dealt out evenly over the tensor x context ranks (``models/qwen2_5_vl/images.py``).
    """
    layout, multiples = ParallelLayout.from_config(config.parallel), Multiples.of(config.parallel)
    longest = longest_sequence(config)
    sequences = -(-sequences_per_update(config) // layout.data)
    budget = min(config.trainer.micro_batch_tokens, (config.trainer.micro_batch_sequences or sequences) * longest)
    tokens = max(budget // multiples.tokens, 1) * multiples.tokens
    image_tokens = min(config.data.max_pixels // model.vision.pixels_per_token, config.data.max_prompt_tokens)
    images = min(sequences, tokens // max(1, image_tokens))
    of_image = image_tokens * model.vision.merged
    return Workload(
        tokens=tokens,
        loss_tokens=min(tokens, sequences * config.rollout.max_response_tokens),
        patches=-(-images // (layout.tensor * layout.context)) * of_image,
        patches_of_image=of_image,
        microbatches=-(-sequences // multiples.microbatches) * multiples.microbatches,
        chunk_tokens=config.trainer.logprob_chunk_tokens,
        span=longest,
    )


def setting_of(config: Config, layers: Layers) -> Setting:
    """What the configuration says about how much is kept."""
    frozen = set(config.model.freeze)
    return Setting(
        layout=ParallelLayout.from_config(config.parallel),
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=config.model.dtype,
        recompute=config.model.recompute,
        layers=layers,
        trains_vision="vision" not in frozen,
        trains_merger="merger" not in frozen,
    )


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt and response."""
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def sequences_per_update(config: Config) -> int:
    """Over all replicas."""
    rollout = rollout_sequences(config)
    return min(config.trainer.mini_batch_sequences or rollout, rollout)


def rollout_sequences(config: Config) -> int:
    """Of one step."""
    return config.rollout.prompts_per_step * config.rollout.samples_per_prompt
