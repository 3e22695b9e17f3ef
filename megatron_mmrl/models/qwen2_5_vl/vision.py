"""The vision tower: Hugging Face's own module, whole on every rank of the first pipeline stage, its work shared out.

Each distinct image of a micro-batch is encoded by one of the TP x CP ranks that read the micro-batch, and all of them
gather the features. In backward the gather adds up the ranks' gradients and hands each rank those of its own images.
Over context-parallel ranks that sum is the gradient, since each has only that of its own tokens. Over T
tensor-parallel ranks it is T times the gradient, since each has all of it (the language model's first linear layer, or
the scatter of sequence parallelism, has already joined theirs); Megatron then averages what a tensor-parallel group
holds of a tower's weight (``average_gradients_across_tp_domain``) and sums over context- and data-parallel ranks. Both
together give the gradient of the loss, the same bits on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.models.qwen2_5_vl.image_cache import SharedImageCache
from megatron_mmrl.models.qwen2_5_vl.images import (
    DistinctImages,
    content_key,
    deal_images,
    distinct_images,
    feature_rows,
    share_height,
)
from megatron_mmrl.parallel.device import device
from megatron_mmrl.parallel.hooks import before_use

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed import ProcessGroup
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel


def build_vision(config: Qwen2_5_VLConfig, dtype: torch.dtype) -> Qwen2_5_VisionTransformerPretrainedModel:
    """The tower with its merger; weights are to be loaded.

    Called with patches [N, D] and a grid [I, 3], its ``pooler_output`` is [N / merge^2, hidden of the language model].
    """
    declare_torchvision_ops()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config.vision_config._attn_implementation = "sdpa"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)
    for parameter in tower.parameters():
        # Parameters only: the rotary frequencies are a buffer and stay float32, as they do in Hugging Face's loader.
        parameter.data = parameter.data.to(dtype)
        parameter.average_gradients_across_tp_domain = True  # see the module's docstring
    return tower.to(device())


class ImageEncoder:
    """Images of a micro-batch -> features, each distinct image encoded once.

    Where the tower below the merger is frozen, its output is kept for later micro-batches on the rank that made it, by
    content: the merged features, or, while the merger is trained, the states that it reads.

    Args:
        tower: from ``build_vision``; its parameters are the model's, this object only uses it.
        group: the ranks that read the same micro-batches, ``get_tensor_and_context_parallel_group()``.
        cache_bytes: what a rank keeps at most, on the host; 0: nothing.
    """

    def __init__(self, tower: Qwen2_5_VisionTransformerPretrainedModel, group: ProcessGroup, cache_bytes: int) -> None:
        self._tower, self._group, self._cache_bytes = tower, group, cache_bytes
        self._merged_patches = tower.config.spatial_merge_size**2
        self._cached: tuple[object, SharedImageCache] | None = None  # state of the weights and what they made

    def __call__(self, pixel_values: Tensor | None, image_grid_thw: Tensor | None) -> Tensor:
        """Features of all images, on every rank of the group. Collective over it.

        A rank that has no image to encode still returns something that depends on every trained weight, with gradient
        zero: Megatron's overlapped gradient reduction waits for a gradient of each.

        Args:
            pixel_values: float32 [N, 1176] on the host, equal on all ranks; None: no images.
            image_grid_thw: int64 [I, 3], likewise, in patches.

        Returns:
            [N / merge^2, H] in the tower's dtype, on its device, in the order of the images.
        """
        if pixel_values is None or image_grid_thw is None or not len(image_grid_thw):
            return self._no_features()
        images = distinct_images(pixel_values, image_grid_thw)
        if self._cache_bytes and not any(parameter.requires_grad for parameter in self._below_merger()):
            shares, own = self._recall(images)
        else:
            shares = deal_images(images.num_patches, self._group.size())
            own = self._encode(images, shares[self._group.rank()])
        lengths = [patches // self._merged_patches for patches in images.num_patches]
        missing = share_height(shares, lengths) - len(own)
        padded = torch.cat([own, own.new_zeros(missing, own.shape[1])])
        joined = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=True, group=self._group)
        return joined.index_select(0, feature_rows(shares, lengths, images.of_image).to(joined.device))

    def _below_merger(self) -> Iterator[Tensor]:
        return (parameter for name, parameter in self._tower.named_parameters() if not name.startswith("merger."))

    def _encode(self, images: DistinctImages, share: Sequence[int]) -> Tensor:
        """Features of this rank's images."""
        if not share:
            return self._no_features()
        pixels = torch.cat([images.pixels[image] for image in share]).to(device())
        return self._tower(pixels, grid_thw=images.grids[list(share)].to(device())).pooler_output

    def _no_features(self) -> Tensor:
        """[0, H]"""
        before_use(self._tower)  # in place of its call
        weight = next(self._tower.parameters())
        none = torch.empty(0, self._tower.config.out_hidden_size, dtype=weight.dtype, device=weight.device)
        if not torch.is_grad_enabled():
            return none
        return none + 0.0 * sum(p.flatten()[0] for p in self._tower.parameters() if p.requires_grad)

    def _recall(self, images: DistinctImages) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
        """Who has which image, and the features of this rank's: merged now, or kept merged."""
        merger_learns = any(parameter.requires_grad for parameter in self._tower.merger.parameters())
        cache = self._cache(merger_learns)
        config = self._tower.config
        row = config.hidden_size if merger_learns else config.out_hidden_size / self._merged_patches
        nbytes = [round(n * row) * next(self._tower.parameters()).itemsize for n in images.num_patches]
        keys = [content_key(pixels, grid) for pixels, grid in zip(images.pixels, images.grids, strict=True)]
        shares = deal_images(images.num_patches, self._group.size(), cache.owners(keys))
        kept = cache.recall(keys, shares, nbytes, lambda image: self._encode_frozen(images, image, merger_learns))
        if not kept:
            return shares, self._no_features()
        own = torch.cat(kept).to(device())
        return shares, self._tower.merger(own) if merger_learns else own

    def _cache(self, merger_learns: bool) -> SharedImageCache:
        """What the present weights made: loading others empties it."""
        used = self._below_merger() if merger_learns else self._tower.parameters()
        state = (merger_learns, sum(parameter._version for parameter in used))
        if self._cached is None or self._cached[0] != state:
            cache = SharedImageCache(
                num_ranks=self._group.size(), own_rank=self._group.rank(), max_bytes=self._cache_bytes
            )
            self._cached = (state, cache)
        return self._cached[1]

    @torch.no_grad()
    def _encode_frozen(self, images: DistinctImages, image: int, before_merger: bool) -> Tensor:
        """Features of one image, or the states [patches, hidden] that the merger makes them of, on the host.

        One image at a time: what is kept must not depend on the others of a micro-batch, or a resumed run, which
        starts with nothing, would differ from one that never stopped.
        """
        grid = images.grids[image : image + 1]
        out = self._tower(images.pixels[image].to(device()), grid_thw=grid.to(device()))
        if not before_merger:
            return out.pooler_output.cpu()
        return self._in_order(out.last_hidden_state, grid).cpu()

    def _in_order(self, states: Tensor, grid: Tensor) -> Tensor:
        """States leave the tower window by window; the merger makes one feature of each run of merge^2 of them."""
        from transformers.vision_utils import get_vision_window_index

        config = self._tower.config
        windows, _ = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        return states.unflatten(0, (-1, self._merged_patches))[windows.argsort().to(states.device)].flatten(0, 1)
