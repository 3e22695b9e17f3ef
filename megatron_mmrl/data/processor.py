"""The one place where a prompt becomes tokens and patches; trainer and engine both rely on what comes out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.compat import declare_torchvision_ops
from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.errors import BadPromptError, PromptTooLongError
from megatron_mmrl.data.image_processor import ImageProcessor, Outcome, ProcessedImage, write_image_processor
from megatron_mmrl.data.images import content_hash
from megatron_mmrl.types import IMAGE_TAG, EncodedPrompt, Prompt

_TURN_START = "<|im_start|>"
_ENGINE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "video_preprocessor_config.json",
)


class Processor:
    """Tokenizer, chat template and image processor of a model directory.

    Args:
        model_path: a Hugging Face checkpoint; its weights are not read.
        config: pixel limits, longest prompt, cache size.
    """

    def __init__(self, model_path: str, config: DataConfig) -> None:
        declare_torchvision_ops()
        from transformers import AutoTokenizer

        self._path, self._config = Path(model_path), config
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        if self._tokenizer.chat_template is None:
            self._tokenizer.chat_template = _legacy_chat_template(self._path)
        self.images = ImageProcessor(model_path, config)
        self._model = json.loads((self._path / "config.json").read_text(encoding="utf-8"))
        self.image_token_id: int = self._model["image_token_id"]
        self.merge_size = self.images.merge_size
        self.end_token_id: int = self._tokenizer.eos_token_id
        self.pad_token_id: int = self._tokenizer.pad_token_id
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def encode(self, prompt: Prompt, images: Mapping[str, Outcome] | None = None) -> EncodedPrompt:
        """Token ids as Hugging Face's processor would give them, with the patches of the images.

        Args:
            images: what ``self.images.process_all`` returned, when it was called for several prompts at once.

        Raises:
            BadPromptError: an image cannot be decoded, the text holds a special token, pads and images disagree.
            PromptTooLongError: more than ``data.max_prompt_tokens`` tokens.
        """
        outcomes = self.images.process_all(prompt.images) if images is None else images
        processed = [_image_of(prompt, number, data, outcomes) for number, data in enumerate(prompt.images)]
        engine_ids = self._tokenize(prompt)
        tokens = [int(image.grid_thw.prod()) // self.merge_size**2 for image in processed]
        encoded = EncodedPrompt(
            prompt=prompt,
            ids=_expand(prompt, engine_ids, self.image_token_id, tokens),
            engine_ids=engine_ids,
            images=tuple(image.png for image in processed),
            pixel_values=_stack([image.pixel_values for image in processed], self.images.patch_dim),
            image_grid_thw=np.array([image.grid_thw for image in processed], dtype=np.int64).reshape(-1, 3),
        )
        check_image_tokens(encoded, self.image_token_id, self.merge_size)
        if len(encoded.ids) > self._config.max_prompt_tokens:
            raise PromptTooLongError(
                prompt.id,
                f"{len(encoded.ids)} tokens, more than data.max_prompt_tokens={self._config.max_prompt_tokens}",
            )
        return encoded

    def num_tokens(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> int:
        """Length that ``encode`` would give, from the sizes of the images alone, (width, height) in pixels.

        Raises:
            BadPromptError: the text holds a special token, the template makes other than one pad per image.
            BadImageError: an image is too long and narrow.
        """
        tokens = [self.images.num_tokens(width, height) for width, height in sizes]
        return len(_expand(prompt, self._tokenize(prompt), self.image_token_id, tokens))

    def decode(self, ids: Sequence[int] | NDArray[np.int64]) -> str:
        """Text without special tokens; visible tags such as ``<think>`` stay."""
        text = self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cast("str", text)  # one sequence: not a list of texts

    def encode_text(self, text: str) -> NDArray[np.int64]:
        """An assistant's turn as token ids, [R], the end-of-turn token last: the target of supervised training.

        Raises:
            ValueError: the text holds a special token.
        """
        if found := self._special.search(text):
            raise ValueError(f"the text {text!r} holds the special token {found.group()}")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array([*ids, self.end_token_id], dtype=np.int64)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: those of ``generation_config.json`` and the tokenizer's own."""
        file = self._path / "generation_config.json"
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.exists() else None
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return tuple(sorted({self.end_token_id, *listed}))

    def banned_token_ids(self) -> tuple[int, ...]:
        """What must never be sampled, ascending.

        Image, video and vision tokens (a sampled pad has no pixels), the start-of-turn token, and every id of the
        model's vocabulary that no token belongs to. Stop tokens are not among them.
        """
        added = self._tokenizer.added_tokens_decoder
        banned = {i for i, token in added.items() if _is_vision(token.content) or token.content == _TURN_START}
        banned |= {value for key, value in self._model.items() if key.endswith("_token_id") and _is_vision(key)}
        banned |= set(range(len(self._tokenizer), self.vocab_size))
        return tuple(sorted(banned - set(self.stop_token_ids)))

    @property
    def vocab_size(self) -> int:
        """Rows of the model's output layer, ids beyond the tokenizer included."""
        return self._model.get("text_config", self._model)["vocab_size"]

    def write_engine_dir(self, out: Path) -> None:
        """Write the model directory an engine starts from: all but the weights, with this run's pixel limits."""
        out.mkdir(parents=True, exist_ok=True)
        for name in _ENGINE_FILES:
            if (self._path / name).exists():
                shutil.copyfile(self._path / name, out / name)
        write_image_processor(self.images, self._path, out)

    def _tokenize(self, prompt: Prompt) -> NDArray[np.int64]:
        for message in prompt.messages:
            if found := self._special.search(message.text):
                raise BadPromptError(
                    prompt.id, f"the {message.role} turn holds the special token {found.group()} as literal text"
                )
        chat: list[dict[str, Any]] = [
            {"role": message.role, "content": _parts(message.text)} for message in prompt.messages
        ]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return np.array(self._tokenizer(text)["input_ids"], dtype=np.int64)


def check_image_tokens(encoded: EncodedPrompt, image_token_id: int, merge_size: int) -> None:
    """Refuse, by name, a prompt whose image pads and patches disagree; the model would read other images' features.

    Raises:
        BadPromptError: pads != sum(t * h * w) / merge_size^2, or patches != sum(t * h * w).
    """
    patches = int(encoded.image_grid_thw.prod(axis=1).sum())
    pads = int((encoded.ids == image_token_id).sum())
    if pads * merge_size**2 != patches:
        raise BadPromptError(
            encoded.prompt.id,
            f"{pads} image tokens, but the grids hold {patches} patches = {patches / merge_size**2:g} tokens",
        )
    if len(encoded.pixel_values) != patches:
        raise BadPromptError(
            encoded.prompt.id, f"{len(encoded.pixel_values)} rows of pixels, but the grids hold {patches} patches"
        )


def _parts(text: str) -> str | list[dict[str, str]]:
    """``"<image>Which?"`` -> ``[{"type": "image"}, {"type": "text", "text": "Which?"}]``."""
    if IMAGE_TAG not in text:
        return text
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_TAG)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _image_of(prompt: Prompt, number: int, data: bytes, outcomes: Mapping[str, Outcome]) -> ProcessedImage:
    outcome = outcomes[content_hash(data)]
    if isinstance(outcome, str):
        raise BadPromptError(prompt.id, f"image {number}: {outcome}")
    return outcome


def _expand(
    prompt: Prompt, engine_ids: NDArray[np.int64], image_token_id: int, tokens: Sequence[int]
) -> NDArray[np.int64]:
    """Repeat the i-th image pad ``tokens[i]`` times."""
    pads = engine_ids == image_token_id
    if pads.sum() != len(tokens):
        raise BadPromptError(prompt.id, f"the chat template made {pads.sum()} image tokens of {len(tokens)} images")
    repeats = np.ones(len(engine_ids), dtype=np.int64)
    repeats[pads] = tokens
    return np.repeat(engine_ids, repeats)


def _stack(pixel_values: Sequence[NDArray[np.float32]], patch_dim: int) -> NDArray[np.float32]:
    if len(pixel_values) == 1:
        return pixel_values[0]  # shared with the cache, not copied
    return np.concatenate([np.zeros((0, patch_dim), dtype=np.float32), *pixel_values])


def _is_vision(name: str) -> bool:
    return any(word in name for word in ("image", "video", "vision"))


def _legacy_chat_template(path: Path) -> str:
    file = path / "chat_template.json"
    if not file.exists():
        raise ValueError(f"{path} has no chat template: neither in its tokenizer nor as chat_template.json")
    return json.loads(file.read_text(encoding="utf-8"))["chat_template"]
