"""The learning rate as a pure function of the update."""

from __future__ import annotations

import math

from megatron_mmrl.config.optim import OptimConfig


def lr_at(update: int, optim: OptimConfig, total_updates: int) -> float:
    """Learning rate of optimizer update ``update`` (0 is the first) out of ``total_updates``.

    Warm-up climbs in equal parts, ``lr x (update + 1) / (warmup_updates + 1)``, so no update is without effect and
    update ``warmup_updates`` is the first at ``lr``. From there the rate goes to ``min_lr`` at the last update, in a
    straight line or along half a cosine (Loshchilov and Hutter, arXiv:1608.03983, no restarts), or stays at ``lr``.
    Beyond the last update it stays where it ended.
    """
    if update < 0:
        raise ValueError(f"update={update}: the first update is 0")
    if update < optim.warmup_updates:
        return optim.lr * (update + 1) / (optim.warmup_updates + 1)
    if optim.schedule == "constant":
        return optim.lr
    decay_updates = max(1, total_updates - 1 - optim.warmup_updates)
    progress = min(1.0, (update - optim.warmup_updates) / decay_updates)
    remaining = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining
