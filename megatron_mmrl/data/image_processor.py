"""One image file -> what the model sees (patches) and what the engine is sent (PNG of the same pixels)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.errors import BadImageError
from megatron_mmrl.data.images import content_hash, open_image, to_png
from megatron_mmrl.lru import LruBytes

_MAX_SIDE_RATIO = 200
T = TypeVar("T")


class Exchange(Protocol):
    """All ranks of the run, for sharing work between them."""

    rank: int
    world_size: int

    def all_gather(self, value: T) -> list[T]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedImage:
    """Patches of one image and the lossless PNG they were cut from."""

    png: bytes
    pixel_values: NDArray[np.float32]  # [n, D] patches
    grid_thw: NDArray[np.int64]  # [3], n = t * h * w

    @property
    def nbytes(self) -> int:
        return len(self.png) + self.pixel_values.nbytes


Outcome = ProcessedImage | str
"""A processed image, or why there is none."""


class ImageProcessor:
    """Hugging Face's image processor of the model (its PIL form), with the run's pixel limits.

    The image is resized to the model's grid *here*, and the PNG holds the resized pixels. The engine's own resize
    then has nothing to do (torchvision's differs from PIL's by 0.015 in the patches), and a large photo is not sent
    in full.
    """

    def __init__(self, model_path: str, config: DataConfig) -> None:
        declare_torchvision_ops()
        from transformers import AutoImageProcessor

        limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
        self._hf = AutoImageProcessor.from_pretrained(model_path, backend="pil", size=size, **limits)
        self._limits, self._max_decoded_pixels = limits, config.max_decoded_pixels
        self._cache: LruBytes[Outcome] = LruBytes(config.cache_bytes)
        self.merge_size: int = self._hf.merge_size
        self.patch_dim: int = 3 * self._hf.temporal_patch_size * self._hf.patch_size**2

    def process(self, data: bytes) -> ProcessedImage:
        """Decode, resize and cut one image file. Raises BadImageError."""
        image = self._resized(open_image(data, self._max_decoded_pixels))
        output = self._hf(images=[image], return_tensors="np")
        return ProcessedImage(
            png=to_png(image),
            pixel_values=output["pixel_values"].astype(np.float32, copy=False),
            grid_thw=output["image_grid_thw"][0].astype(np.int64, copy=False),
        )

    def process_all(self, files: Iterable[bytes], exchange: Exchange | None = None) -> dict[str, Outcome]:
        """Content hash -> processed image, or why there is none, each distinct content once.

        With ``exchange`` the ranks share the work; every rank must call with the same files in the same order.
        """
        distinct = {content_hash(data): data for data in files}
        known = {key: outcome for key in distinct if (outcome := self._cache.get(key)) is not None}
        missing = [key for key in distinct if key not in known]
        for key, outcome in self._shared(missing, distinct, exchange).items():
            known[key] = outcome
            self._cache.put(key, outcome, outcome.nbytes if isinstance(outcome, ProcessedImage) else 1)
        return known

    def settings(self) -> dict[str, object]:
        """What ``preprocessor_config.json`` must hold for another process to do the same."""
        return json.loads(self._hf.to_json_string())

    def _shared(self, missing: list[str], files: Mapping[str, bytes], exchange: Exchange | None) -> dict[str, Outcome]:
        if exchange is None or exchange.world_size == 1 or not missing:
            return {key: self._outcome(files[key]) for key in missing}
        mine = {key: self._outcome(files[key]) for key in missing[exchange.rank :: exchange.world_size]}
        return {key: outcome for part in exchange.all_gather(mine) for key, outcome in part.items()}

    def _outcome(self, data: bytes) -> Outcome:
        try:
            return self.process(data)
        except BadImageError as error:
            return str(error)

    def num_tokens(self, width: int, height: int) -> int:
        """Tokens of an image of that size in pixels, after the resize. Raises BadImageError: too long and narrow."""
        fitted_width, fitted_height = self._size(width, height)
        return fitted_width * fitted_height // (self._hf.patch_size * self.merge_size) ** 2

    def _size(self, width: int, height: int) -> tuple[int, int]:
        return fitted_size(width, height, factor=self._hf.patch_size * self.merge_size, **self._limits)

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = self._size(image.width, image.height)
        if self._size(width, height) != (width, height):
            return image  # limits closer than one step of the grid: a second resize would change the size again
        return image.resize((width, height), resample=self._hf.resample)


def fitted_size(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Width and height after Qwen2-VL's resize (``smart_resize``): multiples of ``factor`` within the limits.

    Raises:
        BadImageError: one side is more than 200 times the other.
    """
    sides = (width, height)
    if max(sides) > _MAX_SIDE_RATIO * min(sides):
        raise BadImageError(f"image of {width} x {height} pixels: its aspect ratio is above {_MAX_SIDE_RATIO}")
    fitted = [round(side / factor) * factor for side in sides]
    if math.prod(fitted) > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        fitted = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif math.prod(fitted) < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        fitted = [math.ceil(side * grow / factor) * factor for side in sides]
    return fitted[0], fitted[1]


def write_image_processor(processor: ImageProcessor, source: Path, out: Path) -> None:
    """Write the image settings of ``processor`` into the model directory ``out``, a copy of ``source``."""
    settings = processor.settings()
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    combined = source / "processor_config.json"  # where transformers 5 keeps all parts of a processor
    if combined.exists():
        parts = json.loads(combined.read_text(encoding="utf-8"))
        if "image_processor" in parts:
            parts["image_processor"] = settings
        (out / "processor_config.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
