"""What a frozen vision tower made of images, kept by the rank that made it, with all ranks knowing who has what.

Ranks of one group see the same images in the same order and share them out by the same plan. So each follows the
caches of all, with names and sizes but only its own tensors, and none has to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_mmrl.lru import LruBytes

_ELSEWHERE = torch.empty(0)


class SharedImageCache:
    """One cache per rank of a group, each bounded by ``max_bytes``, the longest unused images forgotten first."""

    def __init__(self, *, num_ranks: int, own_rank: int, max_bytes: int) -> None:
        self._own_rank = own_rank
        self._by_rank: list[LruBytes[Tensor]] = [LruBytes(max_bytes) for _ in range(num_ranks)]

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps."""
        return self._by_rank[self._own_rank].nbytes

    def owners(self, keys: Sequence[str]) -> dict[int, int]:
        """Number of each image that is kept -> the rank that keeps it."""
        return {
            number: rank for number, key in enumerate(keys) for rank, cache in enumerate(self._by_rank) if key in cache
        }

    def recall(
        self,
        keys: Sequence[str],
        shares: Sequence[Sequence[int]],
        nbytes: Sequence[int],
        encode: Callable[[int], Tensor],
    ) -> list[Tensor]:
        """What is known of this rank's images, encoding and keeping those that are new.

        Args:
            keys: contents of all images of the micro-batch.
            shares: images of each rank, those that are kept at the rank that keeps them.
            nbytes: size of each image's result.
            encode: number of an image -> its result, on the host.

        Returns:
            One tensor for each image of this rank's share.
        """
        results = []
        for rank, (cache, share) in enumerate(zip(self._by_rank, shares, strict=True)):
            for image in share:
                result = cache.get(keys[image])
                if result is None:
                    result = encode(image) if rank == self._own_rank else _ELSEWHERE
                    cache.put(keys[image], result, nbytes[image])
                if rank == self._own_rank:
                    results.append(result)
        return results
