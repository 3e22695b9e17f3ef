"""Who encodes which image of a micro-batch, planned from what every rank knows: pixels, grids and past plans.

The ranks that read one micro-batch (the TP x CP ranks of the first pipeline stage) hold the same pixels, so each makes
the same plan and none has to ask another. Copies of an image, such as those of the responses to one prompt, count as
one.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLES = 64  # numbers of an image that are compared before all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class DistinctImages:
    """The D different images among the I of a micro-batch."""

    pixels: tuple[Tensor, ...]
    """float32 [patches, 1176] of each, on the host."""
    grids: Tensor
    """int64 [D, 3], in patches."""
    of_image: tuple[int, ...]
    """[I], which of the D stands at the place of each image."""

    @property
    def num_patches(self) -> tuple[int, ...]:
        """[D]"""
        return tuple(len(pixels) for pixels in self.pixels)


def distinct_images(pixel_values: Tensor, image_grid_thw: Tensor) -> DistinctImages:
    """Find copies: images of one grid whose pixels are equal, bit for bit.

    Args:
        pixel_values: float32 [N, 1176], on the host.
        image_grid_thw: int64 [I, 3], in patches, on the host.
    """
    firsts: list[int] = []  # image number of each distinct one
    of_image: list[int] = []
    alike: dict[tuple[bytes, bytes], list[int]] = {}  # grid and a sample of the pixels -> distinct numbers
    images = pixel_values.split(image_grid_thw.prod(dim=1).tolist())
    for number, (pixels, grid) in enumerate(zip(images, image_grid_thw, strict=True)):
        flat = pixels.flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLES)].numpy().tobytes()
        candidates = alike.setdefault((grid.numpy().tobytes(), sample), [])
        same = next((other for other in candidates if torch.equal(images[firsts[other]], pixels)), None)
        if same is None:
            same = len(firsts)
            firsts.append(number)
            candidates.append(same)
        of_image.append(same)
    return DistinctImages(
        pixels=tuple(images[first] for first in firsts), grids=image_grid_thw[firsts], of_image=tuple(of_image)
    )


def content_key(pixels: Tensor, grid: Tensor) -> str:
    """A name for an image that no other content has (SHA-256 of grid and pixels)."""
    digest = hashlib.sha256(grid.numpy().tobytes())
    digest.update(pixels.contiguous().numpy())
    return digest.hexdigest()


def deal_images(
    num_patches: Sequence[int], num_ranks: int, owners: Mapping[int, int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Deal images to ranks: an owned one to its owner, who has its result; the others so that no rank has much more
    work than another (longest first, each to the rank with the least so far: at most 4/3 of the best possible maximum,
    Graham 1969).

    Args:
        num_patches: work of encoding each image; almost all of it is linear in the patches.
        num_ranks: ranks to deal to.
        owners: image -> rank, for those that cost nothing there.

    Returns:
        The images of each rank, in increasing order.
    """
    owners = owners or {}
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for image, rank in owners.items():
        shares[rank].append(image)
    loads = [(0, rank) for rank in range(num_ranks)]
    for image in sorted(set(range(len(num_patches))) - owners.keys(), key=lambda i: (-num_patches[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(image)
        heapq.heappush(loads, (load + num_patches[image], rank))
    return tuple(tuple(sorted(share)) for share in shares)


def feature_rows(shares: Sequence[Sequence[int]], lengths: Sequence[int], of_image: Sequence[int]) -> Tensor:
    """Where each feature of the micro-batch stands after the ranks' features, each padded to the longest, are joined.

    Args:
        shares: distinct images of each rank, as ``deal_images`` returns them.
        lengths: features of each distinct image.
        of_image: distinct image at each place of the micro-batch.

    Returns:
        int64 [F], rows of the joined tensor, in the order of the micro-batch.
    """
    height = share_height(shares, lengths)
    starts: dict[int, int] = {}
    for rank, share in enumerate(shares):
        start = rank * height
        for image in share:
            starts[image] = start
            start += lengths[image]
    return torch.cat([torch.arange(starts[image], starts[image] + lengths[image]) for image in of_image])


def share_height(shares: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Features of the rank that has the most."""
    return max(sum(lengths[image] for image in share) for share in shares)
