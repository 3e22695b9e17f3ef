"""A tiny model, prompts for it, an engine that runs it, and what Hugging Face says of the same tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.config.rollout import RolloutConfig
from megatron_mmrl.data.processor import Processor
from megatron_mmrl.models.hf_io import to_scheme
from megatron_mmrl.models.tiny import TinySizes, make_tiny_checkpoint
from megatron_mmrl.rollout.server_args import EngineModel
from megatron_mmrl.rollout.sglang_client import SGLangEngine, start_engine
from megatron_mmrl.types import EncodedPrompt, Message, Prompt, Response

Weights = dict[str, torch.Tensor]
TOLERANCE = 1e-5


@dataclass
class Case:
    """The model directory, its processor, and the same model in Hugging Face."""

    path: Path
    processor: Processor
    reference: torch.nn.Module

    @property
    def banned(self) -> list[int]:
        return list(self.processor.banned_token_ids())

    def weights(self, seed: int | None = None) -> Weights:
        """The checkpoint's tensors; with a seed, each number changed by about 5 %, vision tower included."""
        weights = load_file(self.path / "model.safetensors")
        if seed is None:
            return weights
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in weights.items()
        }

    def prompts(self, count: int, *, first: int = 0) -> list[EncodedPrompt]:
        """Prompts with no, one or two images of several sizes."""
        sizes = ((56, 56), (112, 84), (84, 56))
        return [self.prompt(number, number % 3, sizes[number % len(sizes)]) for number in range(first, first + count)]

    def prompt(self, number: int, num_images: int = 1, size: tuple[int, int] = (56, 56)) -> EncodedPrompt:
        images = tuple(_noise_png(number * 10 + index, size) for index in range(num_images))
        text = "<image>" * num_images + f"Question {number}: which digit?"
        message = Message(role="user", text=text)
        return self.processor.encode(
            Prompt(id=f"case:{number}", source="case", messages=(message,), images=images, answer="7")
        )

    def logits(self, weights: Weights, prompt: EncodedPrompt, response: Response) -> torch.Tensor:
        """Hugging Face's logits for each token of the response, [R, V]."""
        state = {to_scheme(name, "current"): tensor for name, tensor in weights.items()}
        if self.reference.config.tie_word_embeddings:
            state["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.reference.load_state_dict(state)
        ids = torch.tensor(np.concatenate([prompt.ids, response.ids]))[None]
        images = {}
        if prompt.images:
            images = {
                "pixel_values": torch.tensor(prompt.pixel_values),
                "image_grid_thw": torch.tensor(prompt.image_grid_thw),
                "mm_token_type_ids": (ids == self.processor.image_token_id).long(),
            }
        with torch.no_grad():
            logits = self.reference(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
        return logits[len(prompt.ids) - 1 : -1]

    def largest_difference(
        self,
        weights: Weights,
        prompts: Sequence[EncodedPrompt],
        groups: Sequence[Sequence[Response]],
        *,
        temperature: float,
        mask: bool = True,
    ) -> float:
        """Between the engine's log-probs and log softmax(mask(logits) / temperature) of the same tokens."""
        largest = 0.0
        for prompt, group in zip(prompts, groups, strict=True):
            for response in group:
                logits = self.logits(weights, prompt, response)
                if mask:
                    logits[:, self.banned] = float("-inf")
                tokens = torch.tensor(response.ids)[:, None]
                ours = torch.log_softmax(logits / temperature, -1).gather(1, tokens)[:, 0]
                largest = max(largest, (ours - torch.tensor(response.logprobs)).abs().max().item())
        return largest


def make_case(directory: Path, *, tied: bool = False, sizes: TinySizes | None = None) -> Case:
    path = directory / "model"
    texts = ["Question: which digit?", "<think>It is 7.</think><answer>7</answer>"]
    make_tiny_checkpoint(path, texts=texts, tied=tied, sizes=sizes)
    processor = Processor(str(path), DataConfig(min_pixels=56 * 56, max_pixels=112 * 112))
    processor.write_engine_dir(directory / "engine")
    reference = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return Case(path=path, processor=processor, reference=reference)


def start(case: Case, log_path: Path, config: RolloutConfig) -> SGLangEngine:
    return start_engine(
        config,
        EngineModel(path=case.path.parent / "engine", dtype="float32", device="cpu"),
        banned_token_ids=case.banned,
        decode=case.processor.decode,
        log_path=log_path,
    )


def update(engine: SGLangEngine, weights: Weights, version: int) -> None:
    """In two buckets."""
    named = list(weights.items())
    engine.update_weights([named[:30], named[30:]], version)


def _noise_png(seed: int, size: tuple[int, int]) -> bytes:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
