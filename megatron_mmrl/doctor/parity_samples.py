"""Real rows of a data file, each read three ways: as it is, with blank images of the same size, without images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.dataset import PromptDataset
from megatron_mmrl.data.errors import BadPromptError, BadRowError, PromptTooLongError
from megatron_mmrl.data.images import open_image, to_png
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.doctor.parity_oracle import ModelInputs, ReferenceProcessor
from megatron_mmrl.types import IMAGE_TAG, EncodedPrompt, Prompt

AS_IS, BLANK, NO_IMAGE = "as is", "blank", "no image"
_GREY = (127, 127, 127)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One sequence, as our processor and as Hugging Face's made it."""

    sample: str  # "<file>:<row>"
    way: str  # AS_IS, BLANK or NO_IMAGE
    prompt: EncodedPrompt
    response: NDArray[np.int64]  # [R]
    reference: ModelInputs

    @property
    def name(self) -> str:
        return f"{self.sample} ({self.way})"

    @property
    def ours(self) -> ModelInputs:
        """What Megatron reads."""
        return ModelInputs(
            ids=np.concatenate([self.prompt.ids, self.response]),
            num_prompt=len(self.prompt.ids),
            pixel_values=self.prompt.pixel_values,
            image_grid_thw=self.prompt.image_grid_thw,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """All variants, those of a row beside each other, and the rows that could not be used."""

    variants: tuple[Variant, ...]
    skipped: tuple[str, ...]  # "<file>:<row>: why"


def read_samples(
    file: Path, count: int, *, config: DataConfig, ours: Processor, reference: ReferenceProcessor
) -> Samples:
    """The first ``count`` rows of an even spread over the file that can be used.

    The response is the row's ``extra_info.solution``, or else its gold answer.

    Raises:
        ValueError: the file cannot be read, or no row can be used.
    """
    dataset = PromptDataset([str(file)], config)
    variants: list[Variant] = []
    skipped: list[str] = []
    used = 0
    for row in _spread(len(dataset), count):
        try:
            variants += _variants(dataset.prompt(row), config, ours, reference)
            used += 1
        except (BadRowError, BadPromptError, PromptTooLongError) as error:
            skipped.append("{}:{}: {}".format(*dataset.locate(row), error))
        if used == count:
            break
    if not variants:
        raise ValueError(f"none of the {len(dataset)} rows of {file} can be used: {skipped[:1]}")
    return Samples(variants=tuple(variants), skipped=tuple(skipped))


def explain_inputs(
    variants: Sequence[Variant], ours: Mapping[str, object], reference: Mapping[str, object]
) -> str | None:
    """Names the first sequence that our processor reads differently from Hugging Face's, and the settings that differ.

    Args:
        ours: settings of the image processor, as ``preprocessor_config.json`` holds them.
        reference: Hugging Face's likewise.
    """
    for variant in variants:
        what = _difference_of(variant.ours, variant.reference)
        if what is not None:
            other = [
                f"{key} is {ours[key]} instead of {reference[key]}"
                for key in sorted(ours.keys() & reference.keys())
                if ours[key] != reference[key]
            ]
            return f"{variant.name}: {what}; " + (", ".join(other) or "the settings of the image processors are equal")
    return None


def _difference_of(ours: ModelInputs, reference: ModelInputs) -> str | None:
    if not np.array_equal(ours.image_grid_thw, reference.image_grid_thw):
        return f"image_grid_thw is {ours.image_grid_thw.tolist()} instead of {reference.image_grid_thw.tolist()}"
    if not np.array_equal(ours.ids, reference.ids):
        shared = min(len(ours.ids), len(reference.ids))
        at = int(np.argmin(np.append(ours.ids[:shared] == reference.ids[:shared], False)))
        return (
            f"input_ids ({len(ours.ids)}, Hugging Face has {len(reference.ids)}) differ from index {at} on: "
            f"{ours.ids[at : at + 4].tolist()} instead of {reference.ids[at : at + 4].tolist()}"
        )
    if not np.array_equal(ours.pixel_values, reference.pixel_values):
        gap = np.abs(ours.pixel_values - reference.pixel_values).max()
        return f"pixel_values differ by up to {gap:.2g}"
    return None


def _spread(total: int, count: int) -> Iterator[int]:
    """``count`` rows at equal distances, then all others."""
    first = dict.fromkeys(np.linspace(0, max(total - 1, 0), min(count, total)).round().astype(int).tolist())
    yield from first
    yield from (row for row in range(total) if row not in first)


def _variants(prompt: Prompt, config: DataConfig, ours: Processor, reference: ReferenceProcessor) -> list[Variant]:
    text = str(prompt.meta.get("solution") or prompt.answer)
    try:
        response = ours.encode_text(text)
    except ValueError as error:
        raise BadRowError(str(error)) from error
    ways = {AS_IS: prompt}
    if prompt.images:
        ways[BLANK] = replace(prompt, images=tuple(_blank(image, config) for image in prompt.images))
        messages = tuple(replace(message, text=message.text.replace(IMAGE_TAG, "")) for message in prompt.messages)
        ways[NO_IMAGE] = replace(prompt, images=(), messages=messages)
    return [
        Variant(
            sample=prompt.id,
            way=way,
            prompt=ours.encode(variant),
            response=response,
            reference=reference(variant, text),
        )
        for way, variant in ways.items()
    ]


def _blank(image: bytes, config: DataConfig) -> bytes:
    try:
        return to_png(Image.new("RGB", open_image(image, config.max_decoded_pixels).size, _GREY))
    except ValueError as error:
        raise BadRowError(f"image: {error}") from error
