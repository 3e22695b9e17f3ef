"""A rank's policy and packer without engine and data, and sequences to train on, for tests that compare layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mmrl.config import Config, load_config
from megatron_mmrl.trainer.packing import Packer
from megatron_mmrl.types import TrainSequence

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LENGTHS = ((9, 4), (7, 6), (12, 3), (5, 5), (8, 1), (6, 7), (10, 4), (4, 2))  # prompt and response tokens
BASE = ("algorithm.kl_coef=0.1", "optim.lr=1e-2", "optim.eps=1e-2", "optim.schedule=constant",
        "optim.warmup_updates=0")  # fmt: skip


def config_of(model_path: Path, *overrides: str) -> Config:
    return load_config(CONFIG, [f"model.path={model_path}", "parallel.tensor_model_parallel_size=1", *overrides])


def make_sequences(config: Config) -> list[TrainSequence]:
    """Every other sequence has an image (4 tokens of a 4 x 4 grid); log-probs and advantages are arbitrary."""
    from megatron_mmrl.models.registry import model_facts

    facts = model_facts(config.model.path)
    rng = np.random.default_rng(0)
    sequences = []
    for number, (prompt, response) in enumerate(LENGTHS):
        ids = rng.integers(0, 200, prompt + response)
        grid = np.zeros((0, 3), np.int64)
        if number % 2 and prompt >= 5:
            ids[1:5] = facts.image_token_id
            grid = np.array([[1, 4, 4]])
        text = arbitrary_sequence(rng, ids, response)
        pixels = rng.normal(size=(int(grid.prod(axis=1).sum()), 1176)).astype(np.float32)
        sequences.append(replace(text, pixel_values=pixels, image_grid_thw=grid))
    return sequences


def arbitrary_sequence(rng: np.random.Generator, ids: NDArray[np.int64], response: int) -> TrainSequence:
    """Without images; the last ``response`` tokens are trained, with log-probs and advantages drawn from ``rng``."""
    mask = np.arange(len(ids)) >= len(ids) - response
    return TrainSequence(
        ids=ids,
        loss_mask=mask,
        advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
        rollout_logprobs=np.where(mask, rng.normal(-5, 0.1, len(ids)), 0).astype(np.float32),
        pixel_values=np.zeros((0, 1176), np.float32),
        image_grid_thw=np.zeros((0, 3), np.int64),
    )


def build(
    config: Config,
    *,
    temperature: float = 0.7,
    banned: Sequence[int] | None = None,
    chunk_tokens: int = 5,
    repetition_penalty: float = 1.0,
):
    """As the composition root makes them; the pad token is 0. ``banned``: by default the image token."""
    from megatron_mmrl.build import packer_for
    from megatron_mmrl.models.registry import model_facts
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize
    from megatron_mmrl.trainer.forward import TokenDistribution
    from megatron_mmrl.trainer.policy import MegatronPolicy

    facts = model_facts(config.model.path)
    layout = initialize(config.parallel, seed=0)
    exchange = Collectives()
    packer: Packer = packer_for(config, layout, pad_id=0, rank=exchange.rank)
    distribution = TokenDistribution(
        temperature=temperature,
        banned=torch.tensor([facts.image_token_id] if banned is None else banned, dtype=torch.int64),
        vocab_size=facts.vocab_size,
        chunk_tokens=chunk_tokens,
        repetition_penalty=repetition_penalty,
    )
    return MegatronPolicy(config, distribution, exchange), packer
