"""The learning rate as a pure function of the update."""

from __future__ import annotations

import math

from megatron_mmrl.config.optim import OptimConfig


def lr_at(update: int, optim: OptimConfig, total_updates: int) -> float:
    """Learning rate of optimizer update ``update`` (0 is the first) out of ``total_updates``.

    Warm-up takes ``warmup_updates`` updates, or ``warmup_fraction`` of all, rounded up. It climbs in equal parts,
    ``lr x (update + 1) / (warm-up + 1)``, so no update is without effect and the first update after it is at ``lr``.
    From there the rate goes to ``min_lr`` at the last update, in a straight line or along half a cosine (Loshchilov
    and Hutter, arXiv:1608.03983, no restarts), or stays at ``lr``. Beyond the last update it stays where it ended.
    """
    if update < 0:
        raise ValueError(f"update={update}: the first update is 0")
    warm_up = optim.warmup_updates
    if optim.warmup_fraction is not None:
        warm_up = math.ceil(optim.warmup_fraction * total_updates)
    if update < warm_up:
        return optim.lr * (update + 1) / (warm_up + 1)
    if optim.schedule == "constant":
        return optim.lr
    decay_updates = max(1, total_updates - 1 - warm_up)
    progress = min(1.0, (update - warm_up) / decay_updates)
    remaining = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * remaining
