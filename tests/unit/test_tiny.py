"""The tiny checkpoint: loads like a real one, is the same every time, and tokenizes as rewards need it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_mmrl.models.tiny import TinySizes, main, make_tiny_checkpoint

TEXTS = ("Which digit is this?", "<think>3+4</think><answer>7</answer>")
SMALL = TinySizes(num_layers=1, vision_depth=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(out, seed=3, texts=TEXTS)
    return out


def load_processor(directory: Path) -> Any:
    from transformers import AutoProcessor  # after make_tiny_checkpoint has made torchvision importable

    return AutoProcessor.from_pretrained(directory)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_same_arguments_give_the_same_bytes_and_another_seed_other_weights(checkpoint: Path, tmp_path: Path) -> None:
    for seed, name in ((3, "again"), (4, "other")):
        make_tiny_checkpoint(tmp_path / name, seed=seed, texts=TEXTS)
    assert files(tmp_path / "again") == files(checkpoint)
    assert (
        load_file(tmp_path / "other/model.safetensors")["lm_head.weight"]
        .ne(load_file(checkpoint / "model.safetensors")["lm_head.weight"])
        .all()
    )


def test_weights_have_the_promised_scale(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype.is_floating_point and tensor.element_size() for tensor in weights.values()} == {4}
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert weights["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(1 / math.sqrt(256), rel=0.05)
    assert weights["visual.patch_embed.proj.weight"].std() == pytest.approx(1 / math.sqrt(1176), rel=0.05)
    assert weights["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    assert weights["model.norm.weight"].eq(1).all()


def test_every_word_is_a_token_every_digit_too_and_tags_stay_visible(checkpoint: Path) -> None:
    tokenizer = load_processor(checkpoint).tokenizer
    ids = tokenizer("<think>3+14</think><answer>17</answer><|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<think>", "3", "+", "1", "4", "</think>", "<answer>", "1", "7", "</answer>", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>3+14</think><answer>17</answer>"
    assert tokenizer.tokenize("Which digit is this?") == ["Which", "Ġdigit", "Ġis", "Ġthis", "?"]
    text = "naïve café\t漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # bytes it has never seen


def test_without_texts_a_token_is_a_byte(tmp_path: Path) -> None:
    main([str(tmp_path), "--seed", "1"])
    tokenizer = load_processor(tmp_path).tokenizer
    assert len(tokenizer("user")["input_ids"]) == 4
    assert len(tokenizer) == 256 + 7 + 4


def test_vocabulary_is_padded_beyond_the_tokenizer(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = load_processor(checkpoint).tokenizer
    vocab_size = config["text_config"]["vocab_size"]
    assert vocab_size % 64 == 0
    assert vocab_size - len(tokenizer) >= 8
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [4, 6, 6]
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_some_ids_are_spare_even_where_the_tokenizer_fills_a_multiple_of_64(tmp_path: Path) -> None:
    pangram = "Sphinx of black quartz, judge my vow while the quick brown fox jumps over some lazy dog"
    make_tiny_checkpoint(tmp_path, texts=[pangram], sizes=replace(SMALL, num_merges=53))
    assert len(load_processor(tmp_path).tokenizer) == 320
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"] == 384


def test_chat_template_writes_qwens_turns(checkpoint: Path) -> None:
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
    ]
    processor = load_processor(checkpoint)
    assert processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_with_nothing_missing(tmp_path: Path, tied: bool) -> None:
    make_tiny_checkpoint(tmp_path, tied=tied, sizes=SMALL)
    from transformers import AutoModelForImageTextToText

    model, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings is tied
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == output.data_ptr()) is tied
    if tied:  # it is the output layer as well, so the logits keep the scale of an untied model
        assert output.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)
