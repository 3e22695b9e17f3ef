"""Algorithms by name. Each is a short function of the configuration; add one by adding a function and its name.

A name only switches on what makes the algorithm what it is; numbers (clips, KL weight, ...) are always those of the
configuration. Where a setting contradicts the name, building fails instead of one of them winning silently.

====== =================================================================================================
grpo    exactly what the keys under ``algorithm.`` say
dapo    grpo + groups of equal rewards are left out; clip-higher is ``clip_high``, 0.28 in the paper
dr_grpo grpo without the division by the standard deviation
====== =================================================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.algorithms.advantages import group_advantages
from megatron_mmrl.algorithms.filters import keep_all, keep_informative
from megatron_mmrl.algorithms.losses import LossFn, policy_loss
from megatron_mmrl.config.algorithm import AlgorithmConfig
from megatron_mmrl.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Three pure functions, bound to their numbers."""

    name: str
    advantage: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Rewards [G] of one group -> advantages [G]."""
    select: Callable[[Group], bool]
    """Whether a scored group is learned from."""
    loss: LossFn
    """What is minimised, one micro-batch at a time."""


def grpo(config: AlgorithmConfig) -> Algorithm:
    """Group Relative Policy Optimization, DeepSeekMath, arXiv 2402.03300."""
    advantage = partial(group_advantages, std_floor=config.std_floor, normalize_std=config.normalize_std)
    informative = partial(keep_informative, std_floor=config.std_floor)
    return Algorithm(
        name="grpo",
        advantage=advantage,
        select=informative if config.drop_uniform_groups else keep_all,
        loss=partial(policy_loss, config=config),
    )


def dapo(config: AlgorithmConfig) -> Algorithm:
    """DAPO, arXiv 2503.14476: token-level loss, clip-higher, no groups without a signal (here without resampling)."""
    _needs_token_mean("dapo", config)
    return replace(grpo(replace(config, drop_uniform_groups=True)), name="dapo")


def dr_grpo(config: AlgorithmConfig) -> Algorithm:
    """Dr. GRPO, arXiv 2503.20783: neither the standard deviation nor a response's own length divides anything."""
    _needs_token_mean("dr_grpo", config)
    return replace(grpo(replace(config, normalize_std=False)), name="dr_grpo")


ALGORITHMS: dict[str, Callable[[AlgorithmConfig], Algorithm]] = {"grpo": grpo, "dapo": dapo, "dr_grpo": dr_grpo}


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that ``algorithm.name`` names. Loads no torch.

    Raises:
        ValueError: unknown name (the nearest one is named), or a setting that contradicts it.
    """
    if config.name not in ALGORITHMS:
        near = difflib.get_close_matches(config.name, ALGORITHMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(ALGORITHMS)}"
        raise ValueError(f"algorithm.name={config.name!r} is not known; {hint}")
    return ALGORITHMS[config.name](config)


def _needs_token_mean(name: str, config: AlgorithmConfig) -> None:
    if config.aggregation != "token_mean":
        raise ValueError(
            f"algorithm.name={name} weighs every token alike, algorithm.aggregation={config.aggregation} does not; "
            "use aggregation=token_mean or name=grpo"
        )
