"""Algorithms by name. Each is a short function of the configuration; add one by adding a function and its name.

A name only switches on what makes the algorithm what it is; numbers (clips, KL weight, ...) are always those of the
configuration. Where a setting contradicts the name, building fails instead of one of them winning silently.

===================== ================ ============ =============================================================
name                  advantage        loss         aggregation (where unset)
===================== ================ ============ =============================================================
grpo                  group mean, std  clip         token_mean
dapo                  group mean, std  clip         token_mean; groups of equal rewards are left out
dr_grpo               group mean       clip         fixed_length
rloo                  leave one out    clip         token_mean
reinforce_pp          batch            clip         token_mean
reinforce_pp_baseline group mean+batch clip         token_mean
gspo                  group mean, std  GSPO         seq_mean
cispo                 group mean, std  CISPO        token_mean
===================== ================ ============ =============================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron_mmrl.algorithms.advantages import (
    adora_weight,
    group_advantages,
    leave_one_out_advantages,
    plain_rewards,
)
from megatron_mmrl.algorithms.estimator import Baseline, Estimator
from megatron_mmrl.algorithms.filters import keep_group
from megatron_mmrl.algorithms.losses import (
    LossFn,
    Surrogate,
    detached_ratios,
    policy_loss,
    sequence_ratios,
    token_ratios,
)
from megatron_mmrl.config.algorithm import Aggregation, AlgorithmConfig
from megatron_mmrl.types import Group, TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Three pure functions, bound to their numbers."""

    name: str
    select: Callable[[Group, int], bool]
    """Whether a scored group is learned from in this step."""
    advantages: Callable[[Sequence[Group], Sequence[TrainSequence]], list[TrainSequence]]
    """Groups and their sequences -> the sequences that are learned from, with advantages."""
    loss: LossFn
    """What is minimised, one micro-batch at a time."""


def grpo(config: AlgorithmConfig) -> Algorithm:
    """Group Relative Policy Optimization, DeepSeekMath, arXiv 2402.03300; exactly what the keys say."""
    baseline = partial(group_advantages, std_floor=config.std_floor, normalize_std=config.normalize_std)
    return _assembled(config, "grpo", baseline)


def dapo(config: AlgorithmConfig) -> Algorithm:
    """DAPO, arXiv 2503.14476: token-level loss, no groups without a signal; its clip-higher is ``clip_high=0.28``."""
    config = _with_aggregation(config, "dapo", "token_mean")
    return replace(grpo(replace(config, drop_uniform_groups=True)), name="dapo")


def dr_grpo(config: AlgorithmConfig) -> Algorithm:
    """Dr. GRPO, arXiv 2503.20783: neither the standard deviation nor a response's own length divides anything."""
    config = _with_aggregation(config, "dr_grpo", "fixed_length", "token_mean")
    return replace(grpo(replace(config, normalize_std=False)), name="dr_grpo")


def rloo(config: AlgorithmConfig) -> Algorithm:
    """RLOO, arXiv 2402.14740: the baseline of a response is the mean of the others."""
    return _assembled(config, "rloo", partial(leave_one_out_advantages, std_floor=config.std_floor))


def reinforce_pp(config: AlgorithmConfig) -> Algorithm:
    """REINFORCE++, arXiv 2501.03262: rewards less the KL to go, per token, normalised over the batch."""
    return _assembled(config, "reinforce_pp", plain_rewards, whitened=True, kl_per_token=True)


def reinforce_pp_baseline(config: AlgorithmConfig) -> Algorithm:
    """REINFORCE++-baseline, same paper: rewards less their group's mean, then normalised over the batch."""
    baseline = partial(group_advantages, std_floor=config.std_floor, normalize_std=False)
    return _assembled(config, "reinforce_pp_baseline", baseline, whitened=True)


def gspo(config: AlgorithmConfig) -> Algorithm:
    """GSPO, arXiv 2507.18071: ratios of whole responses. They hardly move: the paper clips at 3e-4 and 4e-4."""
    config = _with_aggregation(config, "gspo", "seq_mean")
    return replace(grpo(config), name="gspo", loss=_loss(config, sequence_ratios))


def cispo(config: AlgorithmConfig) -> Algorithm:
    """CISPO, MiniMax-M1, arXiv 2506.13585: the clipped ratio weighs the log-prob, and no token loses its gradient."""
    config = _with_aggregation(config, "cispo", "token_mean")
    if config.dual_clip is not None:
        raise ValueError(
            f"algorithm.name=cispo bounds the weight of every token by clip_high already; leave "
            f"algorithm.dual_clip={config.dual_clip} out"
        )
    return replace(grpo(config), name="cispo", loss=_loss(config, detached_ratios))


ALGORITHMS: dict[str, Callable[[AlgorithmConfig], Algorithm]] = {
    function.__name__: function
    for function in (grpo, dapo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, gspo, cispo)
}


def build_algorithm(config: AlgorithmConfig, *, max_response_tokens: int | None = None) -> Algorithm:
    """The algorithm that ``algorithm.name`` names. Loads no torch.

    Args:
        max_response_tokens: of the rollout; what ``aggregation_length`` and ``adora.length_limit`` are when unset.

    Raises:
        ValueError: unknown name (the nearest one is named), or a setting that contradicts it or another.
    """
    if config.name not in ALGORITHMS:
        near = difflib.get_close_matches(config.name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(ALGORITHMS)}"
        raise ValueError(f"algorithm.name={config.name!r} is not known; {hint}")
    filtered = config.drop_uniform_groups or config.accuracy_filter.enabled or config.name == "dapo"
    if config.dynamic_sampling.enabled and not filtered:
        raise ValueError(
            "algorithm.dynamic_sampling has nothing to replace: no filter drops any group; set "
            "algorithm.drop_uniform_groups, algorithm.accuracy_filter.enabled or algorithm.name=dapo"
        )
    if max_response_tokens is not None:
        config = replace(
            config,
            aggregation_length=config.aggregation_length or max_response_tokens,
            adora=replace(config.adora, length_limit=config.adora.length_limit or max_response_tokens),
        )
    return ALGORITHMS[config.name](config)


def _assembled(
    config: AlgorithmConfig, name: str, baseline: Baseline, *, whitened: bool = False, kl_per_token: bool = False
) -> Algorithm:
    estimator = Estimator(
        baseline=baseline,
        weight=_adora(config) if config.adora.enabled else None,
        kl_coef=config.kl_coef if config.kl_in == "reward" else 0.0,
        kl_estimator=config.kl_estimator,
        kl_per_token=kl_per_token,
        mask_overlong=config.mask_overlong,
        whitened=whitened,
        std_floor=config.std_floor,
    )
    select = partial(keep_group, config=config)
    return Algorithm(name=name, select=select, advantages=estimator, loss=_loss(config, token_ratios))


def _loss(config: AlgorithmConfig, surrogate: Surrogate) -> LossFn:
    return partial(policy_loss, config=config, surrogate=surrogate)


def _adora(config: AlgorithmConfig) -> partial[float]:
    limits = config.adora
    if limits.length_limit is None:
        raise ValueError("algorithm.adora.enabled needs algorithm.adora.length_limit")
    return partial(adora_weight, lamda=limits.lamda, length_limit=limits.length_limit, threshold=limits.threshold)


def _with_aggregation(config: AlgorithmConfig, name: str, *allowed: Aggregation) -> AlgorithmConfig:
    """The first of ``allowed`` where none is set. Raises ValueError for one that is not among them."""
    if config.aggregation is None:
        return replace(config, aggregation=allowed[0])
    if config.aggregation not in allowed:
        raise ValueError(
            f"algorithm.name={name} is defined with algorithm.aggregation={' or '.join(allowed)}, not "
            f"{config.aggregation}; change it or use name=grpo"
        )
    return config
