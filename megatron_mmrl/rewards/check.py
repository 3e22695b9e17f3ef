"""All that can be known of a run's rewards before it starts: names, kwargs, and whether users' code loads."""

from __future__ import annotations

from dataclasses import replace

from megatron_mmrl.config.reward import RewardConfig
from megatron_mmrl.rewards.dispatch import Dispatcher
from megatron_mmrl.rewards.pool import worker_spec
from megatron_mmrl.rewards.registry import REWARDS, build_term, check_reward_name


def check_rewards(config: RewardConfig) -> None:
    """Build every term once, users' in a process of its own, where it may import what it likes.

    Raises:
        ValueError: a term is unknown, cannot be loaded, or does not take its kwargs.
    """
    for term in config.terms:
        check_reward_name(term.name)
        if term.name in REWARDS:
            build_term(term.name, term.kwargs)
    users = [term for term in config.terms if term.name not in REWARDS]
    if not users:
        return
    try:
        Dispatcher(worker_spec(replace(config, preset=None, legacy=False, terms=users)), num_workers=1).close()
    except RuntimeError as error:
        raise ValueError(f"reward.terms: {', '.join(term.name for term in users)}: {error}") from error
