"""Draws from a categorical distribution that are a pure function of (seed, position): Gumbel-max with hashed noise."""

from __future__ import annotations

import torch

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014),
# as signed integers, because torch has no arithmetic on unsigned ones.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Standard Gumbel noise in float64, one row per (seed, position), independent between entries.

    Args:
        seeds: int64 [B].
        positions: integer [B], index of the token to draw in its sequence.
        num_columns: V.

    Returns:
        float64 [B, V]; row b depends on ``seeds[b]`` and ``positions[b]`` only.
    """
    stream = _mix(_mix(seeds.long()) + positions.long())
    columns = torch.arange(1, num_columns + 1, dtype=torch.int64, device=seeds.device)
    bits = _mix(stream[:, None] + columns[None, :] * _GAMMA)
    # The upper 53 bits, centred: a uniform number strictly inside (0, 1), so both logarithms are finite.
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def draw_tokens(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token per row of ``logprobs`` [B, V] (minus infinity: impossible). Returns int64 [B, 1].

    argmax(log p + Gumbel noise) is a draw from p. Signature of SGLang's ``multinomial_with_seed``.
    """
    noise = gumbel_noise(seed, positions, logprobs.shape[1])
    return (logprobs.double() + noise).argmax(dim=1, keepdim=True)


def _mix(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function; int64 multiplication wraps around, as it needs."""
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _shift_right(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's is arithmetic and would copy the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
