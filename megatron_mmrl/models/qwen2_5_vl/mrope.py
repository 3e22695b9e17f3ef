"""Positions of tokens in time, height and width: a pure function of ids and image grids."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.config.checks import require


def position_ids(
    ids: NDArray[np.int64], image_grid_thw: NDArray[np.int64], *, image_token_id: int, merge_size: int
) -> NDArray[np.int64]:
    """mrope positions (Qwen2-VL, section 2.1) of one sequence; equal to Hugging Face's ``get_rope_index``.

    Text counts 0, 1, 2, ... in all three rows. An image that begins at position p puts its merged patch (t, y, x) at
    (p + t, p + y, p + x), and the text after it goes on at p + max(height, width) in merged patches.

    Args:
        ids: int64 [L], one sequence with its image pads expanded.
        image_grid_thw: int64 [I, 3], in patches, in the order of the images.
        image_token_id: id of the image pad.
        merge_size: patches of a merged patch's side.

    Returns:
        int64 [3, L], rows t, h, w.

    Raises:
        ValueError: the image pads are not exactly those that the grids call for.
    """
    merged = image_grid_thw // np.array([1, merge_size, merge_size])
    pads = np.flatnonzero(ids == image_token_id)
    require(
        pads.size == merged.prod(axis=1).sum(),
        f"{pads.size} image tokens (id {image_token_id}) stand in the sequence, but the grids "
        f"{image_grid_thw.tolist()} make {merged.prod(axis=1).sum()}",
    )
    positions = np.empty((3, ids.size), dtype=np.int64)
    place, position, used = 0, 0, 0  # next token, its position, image pads consumed
    for grid in merged:
        start, count = int(pads[used]), int(grid.prod())
        require(
            pads[used + count - 1] == start + count - 1,
            f"the {count} tokens of an image with merged grid {grid.tolist()} are not adjacent from token {start} on",
        )
        positions[:, place:start] = position + np.arange(start - place)
        position += start - place
        positions[:, start : start + count] = position + np.indices(grid).reshape(3, count)
        position += int(grid[1:].max())
        place, used = start + count, used + count
    positions[:, place:] = position + np.arange(ids.size - place)
    return positions
