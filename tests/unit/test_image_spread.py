"""Which rank encodes which image, as a pure function; and what a frozen tower's cache keeps."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_mmrl.models.qwen2_5_vl.image_cache import SharedImageCache
from megatron_mmrl.models.qwen2_5_vl.images import content_key, deal_images, distinct_images, feature_rows

PATCHES = 1176


def image(seed: int, height: int, width: int) -> tuple[torch.Tensor, list[int]]:
    pixels = torch.randn(height * width, PATCHES, generator=torch.Generator().manual_seed(seed))
    return pixels, [1, height, width]


def together(*images: tuple[torch.Tensor, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([pixels for pixels, _ in images]), torch.tensor([grid for _, grid in images])


def test_copies_count_once_and_likeness_is_not_enough() -> None:
    one, two = image(0, 4, 6), image(1, 4, 6)
    turned = (one[0], [1, 6, 4])
    changed = one[0].clone()
    changed[7, 1] += 1e-6  # not among the numbers that are compared first
    found = distinct_images(*together(one, two, one, turned, (changed, one[1]), two, one))
    assert found.of_image == (0, 1, 0, 2, 3, 1, 0)
    assert found.num_patches == (24, 24, 24, 24)
    for number, (pixels, grid) in enumerate((one, two, turned, (changed, one[1]))):
        assert torch.equal(found.pixels[number], pixels)
        assert found.grids[number].tolist() == grid
    keys = [content_key(pixels, grid) for pixels, grid in zip(found.pixels, found.grids, strict=True)]
    assert len(set(keys)) == 4
    assert content_key(one[0].clone(), torch.tensor(one[1])) == keys[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("patches", [(4,), (4, 4, 4, 4), (900, 16, 16, 400, 16, 1024, 36, 256, 100)])
def test_every_image_is_dealt_once_and_evenly(patches: tuple[int, ...], num_ranks: int) -> None:
    shares = deal_images(patches, num_ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(patches)))
    loads = [sum(patches[image] for image in share) for share in shares]
    best_possible = max(max(patches), -(-sum(patches) // num_ranks))
    assert max(loads) <= best_possible * 4 / 3


def test_dealing_by_hand() -> None:
    # 9 to rank 0, 7 to 1, 6 to 1 (7 < 9), 2 to 0 (9 < 13), 1 to 0 (11 < 13)
    assert deal_images((2, 9, 6, 1, 7), 2) == ((0, 1, 3), (2, 4))
    # Rank 1 knows image 1, which costs nothing there: 7 to 0, 6 to 1, 2 to 1 (6 < 7), 1 to 0 (7 < 8)
    assert deal_images((2, 9, 6, 1, 7), 2, {1: 1}) == ((3, 4), (0, 1, 2))


def test_rows_lead_from_each_place_to_its_features() -> None:
    shares, lengths, of_image = ((0, 2), (1,), ()), (2, 4, 3), (1, 0, 2, 0)
    # Joined: rank 0 from row 0 (image 0: 0-1, image 2: 2-4), rank 1 from row 5 (image 1: 5-8), rank 2 from row 10.
    rows = feature_rows(shares, lengths, of_image)
    assert rows.tolist() == [5, 6, 7, 8, 0, 1, 2, 3, 4, 0, 1]


def test_ranks_follow_each_others_caches_without_talking() -> None:
    """Three ranks see one sequence of micro-batches; an image is encoded again only after it was forgotten."""
    nbytes = {"a": 40, "b": 40, "c": 60, "d": 30, "huge": 200}
    batches = [["a", "b", "c"], ["b", "a"], ["c", "d", "huge"], ["a", "huge", "c"], ["d", "b", "a", "c"]]
    caches = [SharedImageCache(num_ranks=3, own_rank=rank, max_bytes=100) for rank in range(3)]
    encoded: list[tuple[int, str]] = []
    for batch in batches:
        sizes = [nbytes[key] for key in batch]
        shares = {deal_images(sizes, 3, cache.owners(batch)) for cache in caches}
        assert len(shares) == 1
        (share_of,) = shares
        for rank, cache in enumerate(caches):

            def encode(number: int, batch: list[str] = batch, rank: int = rank) -> torch.Tensor:
                encoded.append((rank, batch[number]))
                return torch.tensor(float(ord(batch[number][0])))

            results = cache.recall(batch, share_of, sizes, encode)
            assert [chr(int(result)) for result in results] == [batch[number][0] for number in share_of[rank]]
            assert cache.nbytes <= 100
    names = [name for _, name in encoded]
    assert {name: names.count(name) for name in nbytes} == {"a": 1, "b": 1, "c": 1, "d": 1, "huge": 2}


def test_the_longest_unused_image_is_forgotten_everywhere() -> None:
    caches = [SharedImageCache(num_ranks=2, own_rank=rank, max_bytes=10) for rank in range(2)]
    for cache in caches:
        for key in ("a", "b", "a", "c"):  # all on rank 0; c needs the room of b
            cache.recall([key], ((0,), ()), [5], lambda _: torch.zeros(1))
        assert cache.owners(["a", "b", "c"]) == {0: 0, 2: 0}
    assert [cache.nbytes for cache in caches] == [10, 0]
