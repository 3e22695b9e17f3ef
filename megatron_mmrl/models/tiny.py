"""A tiny random Qwen2.5-VL in Hugging Face format: everything real but the size, made in a second without a download.

``python -m megatron_mmrl.models.tiny OUT_DIR [--seed N] [--tied]``
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mmrl.compat import declare_torchvision_ops

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VISIBLE_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""One token each, and kept when text is decoded without special tokens: rewards have to see them."""

_ROLES = ("system\n", "user\n", "assistant\n")
_SPARE_IDS = 8  # the vocabulary has at least so many ids that no token belongs to, as Qwen's has
# What Qwen's pre-tokenizer splits at: words with their leading space, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySizes:
    """Sizes of the model; the defaults make 0.9 million parameters."""

    num_layers: int = 4
    hidden: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate: int = 256
    max_positions: int = 4096
    vision_depth: int = 2
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_heads: int = 4
    patch: int = 14
    """Pixels of a patch's side."""
    merge: int = 2
    """Patches of a merged patch's side: one image token stands for merge x merge patches."""
    window: int = 112
    """Pixels of an attention window's side; the last vision layer attends to the whole image."""
    num_merges: int = 256
    """At most so many BPE merges are learned from the texts."""


def make_tiny_checkpoint(
    out_dir: Path, *, seed: int = 0, texts: Sequence[str] = (), tied: bool = False, sizes: TinySizes | None = None
) -> None:
    """Write config, float32 weights, tokenizer, image processor and chat template to ``out_dir``.

    The same arguments give the same bytes. Weights are normal with standard deviation 1 / sqrt(fan-in), so that
    activations keep their scale and the model learns within a few dozen steps; biases are 0, norm weights 1.

    Args:
        out_dir: made if missing; files of the same names are overwritten.
        texts: what the BPE merges are learned from; without any, a token is a byte.
        tied: share the input embedding with the output layer.
    """
    declare_torchvision_ops()
    sizes = sizes or TinySizes()
    tokenizer = _tokenizer(texts, sizes.num_merges)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out_dir)
    _save_processor(tokenizer, out_dir, sizes)
    _random_model(_config(tokenizer, tied, sizes), seed).save_pretrained(out_dir)


def _tokenizer(texts: Sequence[str], num_merges: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's splitting rule, Qwen's special tokens and the visible tags."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    vocab, merges = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    if texts:
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=len(vocab) + num_merges, initial_alphabet=alphabet, show_progress=False, min_frequency=1
        )
        learner.train_from_iterator([*_ROLES, *_without_added_tokens(texts)], trainer)
        learned = json.loads(learner.to_str())["model"]
        vocab, merges = learned["vocab"], [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE_TOKENS])
    return tokenizer


def _without_added_tokens(texts: Sequence[str]) -> list[str]:
    """The stretches between added tokens: those are cut out before the BPE model sees a text."""
    boundary = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + VISIBLE_TOKENS)))
    return [piece for text in texts for piece in boundary.split(text) if piece]


def _save_processor(tokenizer: Qwen2Tokenizer, out_dir: Path, sizes: TinySizes) -> None:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patches = {"patch_size": sizes.patch, "merge_size": sizes.merge}
    side = sizes.patch * sizes.merge
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": side * side, "longest_edge": 1280 * side * side}, **patches
    )
    Qwen2_5_VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(out_dir)


def _config(tokenizer: Qwen2Tokenizer, tied: bool, sizes: TinySizes) -> Qwen2_5_VLConfig:
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    half = sizes.hidden // sizes.num_heads // 2
    time = half // 4  # mrope: a quarter of the frequencies for time, the rest shared by height and width
    height = (half - time) // 2
    text = {
        "vocab_size": -(-(len(tokenizer) + _SPARE_IDS) // 64) * 64,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": sizes.max_positions,
        "max_window_layers": sizes.num_layers,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [time, height, half - time - height]},
        "rope_theta": 1e6,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": sizes.vision_depth,
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "num_heads": sizes.vision_heads,
        "out_hidden_size": sizes.hidden,
        "patch_size": sizes.patch,
        "spatial_merge_size": sizes.merge,
        "window_size": sizes.window,
        "fullatt_block_indexes": [sizes.vision_depth - 1],
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
        dtype="float32",
    )


def _random_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):  # its own initialisation, overwritten below, must not move the caller's RNG
        model = Qwen2_5_VLForConditionalGeneration(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, _std(name, parameter, config), generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    eos, pad = config.text_config.eos_token_id, config.text_config.pad_token_id
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=eos, pad_token_id=pad)
    return model


def _std(name: str, weight: torch.Tensor, config: Qwen2_5_VLConfig) -> float:
    if "embed_tokens" in name:  # a lookup has no fan-in; tied, it is the output layer as well
        return 1 / math.sqrt(config.text_config.hidden_size) if config.tie_word_embeddings else 0.02
    return 1 / math.sqrt(weight[0].numel())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: write one checkpoint."""
    parser = argparse.ArgumentParser(description="Write a tiny random Qwen2.5-VL checkpoint.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tied", action="store_true", help="share input and output embeddings")
    options = parser.parse_args(arguments)
    make_tiny_checkpoint(options.out_dir, seed=options.seed, tied=options.tied)


if __name__ == "__main__":
    main()
