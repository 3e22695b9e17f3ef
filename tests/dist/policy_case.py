"""A rank's policy and packer without engine and data, for tests that compare layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_mmrl.config import Config
from megatron_mmrl.trainer.packing import Packer


def build(
    config: Config,
    *,
    temperature: float,
    banned: Sequence[int],
    chunk_tokens: int,
    repetition_penalty: float = 1.0,
):
    """As the composition root makes them; the pad token is 0."""
    from megatron_mmrl.build import packer_for
    from megatron_mmrl.models.registry import model_facts
    from megatron_mmrl.parallel.collectives import Collectives
    from megatron_mmrl.parallel.state import initialize
    from megatron_mmrl.trainer.forward import TokenDistribution
    from megatron_mmrl.trainer.policy import MegatronPolicy

    layout = initialize(config.parallel, seed=0)
    exchange = Collectives()
    packer: Packer = packer_for(config, layout, pad_id=0, rank=exchange.rank)
    distribution = TokenDistribution(
        temperature=temperature,
        banned=torch.tensor(banned, dtype=torch.int64),
        vocab_size=model_facts(config.model.path).vocab_size,
        chunk_tokens=chunk_tokens,
        repetition_penalty=repetition_penalty,
    )
    return MegatronPolicy(config, distribution, exchange), packer
