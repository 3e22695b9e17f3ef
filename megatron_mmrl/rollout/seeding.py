"""The seed of a prompt's draws, from what identifies it in a run. Pure, no torch."""

from __future__ import annotations

import hashlib

_SPARE_BITS = 16  # room for the sample index: seeds of one prompt are consecutive


def prompt_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """Seed of the first sample of a prompt at a step; sample i of it uses this plus i (below 2**16).

    Returns:
        A number in [0, 2**62), a multiple of 2**16, that looks random in all three arguments.
    """
    digest = hashlib.blake2b(f"{run_seed}\n{step}\n{prompt_id}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 2) >> _SPARE_BITS << _SPARE_BITS
