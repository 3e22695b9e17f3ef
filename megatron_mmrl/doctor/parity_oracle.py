"""What Hugging Face says of a checkpoint, by its own processor and model: the side that is taken to be right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.config.checks import require
from megatron_mmrl.data.images import open_image
from megatron_mmrl.doctor.parity_compare import Trace
from megatron_mmrl.doctor.parity_trace import hooked_hf, joined_images
from megatron_mmrl.parallel.device import device, dtype_of, on_cuda
from megatron_mmrl.types import IMAGE_TAG, Prompt

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

Dtype = Literal["float32", "bfloat16"]
_MAX_DECODED_PIXELS = 40_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One sequence as a model reads it."""

    ids: NDArray[np.int64]  # [L], prompt then response, image pads expanded
    num_prompt: int
    pixel_values: NDArray[np.float32]  # [N, D]
    image_grid_thw: NDArray[np.int64]  # [I, 3]

    @property
    def images(self) -> list[NDArray[np.float32]]:
        """Patches of each image."""
        ends = np.cumsum(self.image_grid_thw.prod(axis=1))
        return [part for part in np.split(self.pixel_values, ends[:-1]) if len(part)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLimits:
    """Pixels of an image after scaling."""

    min: int
    max: int


class ReferenceProcessor:
    """Hugging Face's processor of a checkpoint.

    Args:
        limits: None: those of the checkpoint.
    """

    def __init__(self, path: Path, limits: PixelLimits | None) -> None:
        declare_torchvision_ops()
        from transformers import AutoImageProcessor, AutoProcessor

        size = {} if limits is None else {"size": {"shortest_edge": limits.min, "longest_edge": limits.max}}
        self._processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        # Its PIL form: torchvision resizes a little differently, and is not there on every machine.
        self._images = self._processor.image_processor = AutoImageProcessor.from_pretrained(
            path, backend="pil", local_files_only=True, **size
        )
        self._patch_dim = 3 * self._images.temporal_patch_size * self._images.patch_size**2

    @property
    def limits(self) -> PixelLimits:
        """Those in use."""
        return PixelLimits(min=self._images.size["shortest_edge"], max=self._images.size["longest_edge"])

    def settings(self) -> dict[str, object]:
        """Of the image processor, as ``preprocessor_config.json`` holds them."""
        return json.loads(self._images.to_json_string())

    def __call__(self, prompt: Prompt, response: str) -> ModelInputs:
        """The prompt's messages and images, then the assistant's ``response`` with the end of its turn."""
        chat = [{"role": message.role, "content": _content(message.text)} for message in prompt.messages]
        text = self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [open_image(image, _MAX_DECODED_PIXELS) for image in prompt.images]
        out = self._processor(text=[text], images=images or None, return_tensors="np")
        tokenizer = self._processor.tokenizer
        answer = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
        none = np.zeros((0, self._patch_dim), np.float32)
        return ModelInputs(
            ids=np.array([*out["input_ids"][0], *answer], np.int64),
            num_prompt=len(out["input_ids"][0]),
            pixel_values=out["pixel_values"].astype(np.float32) if images else none,
            image_grid_thw=out["image_grid_thw"].astype(np.int64) if images else np.zeros((0, 3), np.int64),
        )


def _content(text: str) -> list[dict[str, str]]:
    """Hugging Face's form of a turn whose images are marked by tags."""
    first, *others = text.split(IMAGE_TAG)
    parts = [{"type": "text", "text": first}]
    for piece in others:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


@torch.no_grad()
def reference_logprobs(path: Path, dtype: Dtype, sequences: Sequence[ModelInputs]) -> list[NDArray[np.float32]]:
    """log p of each response token, [R] each, at temperature 1 and without a mask."""
    with _loaded(path, dtype) as model:
        return [_logprobs(model, inputs) for inputs in sequences]


@torch.no_grad()
def reference_trace(path: Path, dtype: Dtype, inputs: ModelInputs) -> Trace:
    """What one sequence makes of each stage, in the model's order."""
    with _loaded(path, dtype) as model, hooked_hf(model, inputs.images) as recorder:
        _logprobs(model, inputs)
    values = recorder.values
    vision = joined_images(values, len(inputs.image_grid_thw))
    text = {stage: value for stage, value in values.items() if "@" not in stage and stage != "positions"}
    return {"positions": values["positions"], **vision, **text}


@contextmanager
def _loaded(path: Path, dtype: Dtype) -> Iterator[Qwen2_5_VLForConditionalGeneration]:
    """Raises ValueError for a checkpoint that Hugging Face would complete with random numbers."""
    declare_torchvision_ops()
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype_of(dtype), attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    missing, misshapen = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    require(
        not missing and not misshapen,
        f"{path} does not hold its whole model: missing {missing[:3]}, of another shape {misshapen[:3]} "
        f"({len(missing)} and {len(misshapen)} in all)",
    )
    yield model.to(device()).eval()
    model.to("meta")  # its memory is wanted by the next side, whoever still holds it
    if on_cuda():
        torch.cuda.empty_cache()


def _logprobs(model: Qwen2_5_VLForConditionalGeneration, inputs: ModelInputs) -> NDArray[np.float32]:
    ids = torch.from_numpy(inputs.ids)[None].to(device())
    images = {}
    if len(inputs.image_grid_thw):
        images = {
            "pixel_values": torch.from_numpy(inputs.pixel_values).to(device()),
            "image_grid_thw": torch.from_numpy(inputs.image_grid_thw).to(device()),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    response = ids[0, inputs.num_prompt :, None]
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=len(response) + 1, **images)
    logits = out.logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, response)[:, 0].cpu().numpy()
