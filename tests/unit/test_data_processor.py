"""Token ids and patches are exactly Hugging Face's; what cannot be encoded exactly is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mmrl.config.data import DataConfig
from megatron_mmrl.data.errors import BadPromptError, PromptTooLongError
from megatron_mmrl.data.image_processor import fitted_size
from megatron_mmrl.data.images import open_image
from megatron_mmrl.data.processor import Processor, check_image_tokens
from megatron_mmrl.data.template import template_of
from megatron_mmrl.lru import LruBytes
from megatron_mmrl.models.tiny import make_tiny_checkpoint
from megatron_mmrl.types import Message, Prompt
from tests.unit.data_rows import bomb, encoded, picture

CONFIG = DataConfig(min_pixels=56 * 56, max_pixels=168 * 168, max_decoded_pixels=1_000_000, max_prompt_tokens=400)
SIZES = [(56, 56), (300, 200), (20, 30), (500, 33), (168, 168)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(out, texts=["Which digit is this?"])
    return out


@pytest.fixture(scope="module")
def processor(model: Path) -> Processor:
    return Processor(str(model), CONFIG)


@pytest.fixture(scope="module")
def hugging_face(model: Path) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor

    limits = {"min_pixels": CONFIG.min_pixels, "max_pixels": CONFIG.max_pixels}
    direct = AutoProcessor.from_pretrained(model)
    direct.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil", **limits)
    direct.image_processor.size = {"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels}
    return direct


def prompt(text: str, *images: bytes, role: str = "user") -> Prompt:
    return Prompt(
        id="test.parquet:5",
        source="test",
        messages=(Message(role=role, text=text),),  # type: ignore[arg-type]
        images=images,
        answer="7",
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [("How much is 2+2?", 0), ("<image>Which digit is this?", 1), ("First <image>, then\n<image><image> and?", 3)],
)
def test_ids_patches_and_grids_equal_hugging_faces_direct_call(
    processor: Processor, hugging_face: Any, text: str, count: int
) -> None:
    pictures = [picture(*SIZES[number], seed=number) for number in range(count)]
    pieces: list[dict[str, Any]] = [{"type": "text", "text": text.split("<image>")[0]}]
    for piece in text.split("<image>")[1:]:
        pieces += [{"type": "image"}, {"type": "text", "text": piece}]
    rendered = hugging_face.apply_chat_template(
        [{"role": "user", "content": pieces}], add_generation_prompt=True, tokenize=False
    )
    direct = hugging_face(text=[rendered], images=pictures or None, return_tensors="np")

    ours = processor.encode(prompt(text, *map(encoded, pictures)))
    assert ours.ids.tolist() == direct["input_ids"][0].tolist()
    assert ours.engine_ids.tolist() == hugging_face.tokenizer(rendered)["input_ids"]
    assert (ours.ids.dtype, ours.pixel_values.dtype, ours.image_grid_thw.dtype) == (np.int64, np.float32, np.int64)
    if not count:
        assert (ours.pixel_values.shape, ours.image_grid_thw.shape, ours.images) == ((0, 1176), (0, 3), ())
        return
    assert np.array_equal(ours.pixel_values, direct["pixel_values"])
    assert np.array_equal(ours.image_grid_thw, direct["image_grid_thw"])


def test_engine_gets_the_processed_pixels_and_processing_them_again_changes_nothing(processor: Processor) -> None:
    for number, (width, height) in enumerate(SIZES):
        first = processor.images.process(encoded(picture(width, height, seed=number)))
        assert open_image(first.png, 10**6).size == (first.grid_thw[2] * 14, first.grid_thw[1] * 14)
        again = processor.images.process(first.png)
        assert again.png == first.png
        assert np.array_equal(again.pixel_values, first.pixel_values)


def test_a_system_turn_goes_through_the_chat_template(processor: Processor) -> None:
    asked = template_of(replace(CONFIG, system_prompt="Be short.")).apply(prompt("2+2?"))
    text = processor._tokenizer.decode(processor.encode(asked).ids)
    assert text == "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


def test_sizes_alone_tell_the_length(processor: Processor) -> None:
    """What ``mmrl data check`` counts is what a run encodes."""
    for number, size in enumerate(SIZES):
        question = prompt("<image>Which <image>?", encoded(picture(*size, seed=number)), encoded(picture(40, 50)))
        assert processor.num_tokens(replace(question, images=()), [size, (40, 50)]) == len(
            processor.encode(question).ids
        )


def test_fitted_sizes_are_those_of_hugging_face() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 4000, (2000, 2)).tolist():
        least = int(rng.integers(1, 200_000))
        most = least + int(rng.integers(0, 2_000_000))
        if max(width, height) <= 200 * min(width, height):
            fitted = fitted_size(width, height, factor=28, min_pixels=least, max_pixels=most)
            assert fitted == smart_resize(height, width, 28, least, most)[::-1]


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|endoftext|>"])
def test_literal_special_tokens_are_refused(processor: Processor, token: str) -> None:
    with pytest.raises(BadPromptError, match=rf"prompt test.parquet:5: the user turn holds .*{token[2:-2]}"):
        processor.encode(prompt(f"What does {token} mean?"))
    with pytest.raises(ValueError, match="special token"):
        processor.encode_text(f"7{token}")


def test_visible_tags_are_allowed(processor: Processor) -> None:
    assert "<think>" in processor.decode(processor.encode(prompt("Think in <think> and </think>.")).ids)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image 1: image has zero bytes"),
        (encoded(picture())[:-900], "image 1: .* cannot be decoded"),
        (bomb(1001, 1000), "image 1: image claims 1001 x 1000"),
        (encoded(picture(402, 2)), "image 1: .*aspect ratio"),
    ],
    ids=["zero-byte", "truncated", "bomb", "strip"],
)
def test_bad_images_make_bad_prompts(processor: Processor, data: bytes, reason: str) -> None:
    with pytest.raises(BadPromptError, match=rf"prompt test.parquet:5: {reason}") as caught:
        processor.encode(prompt("<image><image>?", encoded(picture()), data))
    assert caught.value.prompt_id == "test.parquet:5"


def test_long_prompts_are_refused_whole(model: Path, processor: Processor) -> None:
    question = prompt("<image>Which digit is this?", encoded(picture()))
    length = len(processor.encode(question).ids)
    exact = Processor(str(model), replace(CONFIG, max_prompt_tokens=length))
    assert len(exact.encode(question).ids) == length
    short = Processor(str(model), replace(CONFIG, max_prompt_tokens=length - 1))
    with pytest.raises(PromptTooLongError, match=f"{length} tokens, more than data.max_prompt_tokens={length - 1}"):
        short.encode(question)


def test_pads_that_disagree_with_the_grids_are_refused(processor: Processor) -> None:
    good = processor.encode(prompt("<image>?", encoded(picture(112, 84))))
    pad, merge = processor.image_token_id, processor.merge_size
    check_image_tokens(good, pad, merge)
    assert (good.ids == pad).sum() == 4 * 3
    extra = replace(good, ids=np.append(good.ids, pad))  # as if the model had sampled one
    with pytest.raises(BadPromptError, match="13 image tokens, but the grids hold 48 patches = 12 tokens"):
        check_image_tokens(extra, pad, merge)
    with pytest.raises(BadPromptError, match="11 image tokens, but the grids hold 48 patches = 12 tokens"):
        check_image_tokens(replace(good, ids=np.delete(good.ids, np.argmax(good.ids == pad))), pad, merge)
    with pytest.raises(BadPromptError, match="47 rows of pixels, but the grids hold 48 patches"):
        check_image_tokens(replace(good, pixel_values=good.pixel_values[:-1]), pad, merge)
    with pytest.raises(BadPromptError, match="12 image tokens, but the grids hold 0 patches"):
        check_image_tokens(replace(good, image_grid_thw=good.image_grid_thw[:0]), pad, merge)
    with pytest.raises(BadPromptError, match="made 1 image tokens of 0 images"):
        processor.encode(prompt("<image>?"))


def test_each_distinct_image_is_processed_once(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Processor(str(processor._path), CONFIG)
    seen: list[bytes] = []
    process = fresh.images.process
    monkeypatch.setattr(fresh.images, "process", lambda data: seen.append(data) or process(data))
    one, two = encoded(picture(seed=1)), encoded(picture(seed=2))
    for _ in range(2):
        fresh.encode(prompt("<image><image><image>?", one, two, one))
        fresh.encode(prompt("<image>!", two))
    assert seen == [one, two]


def test_cache_forgets_the_longest_unused_first_and_never_exceeds_its_size() -> None:
    cache: LruBytes[str] = LruBytes(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)
    assert (cache.get("b"), cache.get("a"), cache.get("c")) == (None, "A", "C")
    cache.put("a", "AA", 6)
    assert (cache.nbytes, len(cache)) == (10, 2)
    cache.put("huge", "H", 11)
    assert (cache.get("huge"), cache.nbytes) == (None, 10)


def test_decode_drops_special_tokens_and_keeps_tags(processor: Processor) -> None:
    text = "<think>3 + 4 , so 7 .</think><answer>7</answer>"
    ids = processor.encode_text(text)
    assert ids[-1] == processor.end_token_id
    assert ids.dtype == np.int64
    assert processor.decode(ids) == text


def test_banned_ids_are_exactly_these(processor: Processor) -> None:
    tokens = processor._tokenizer
    names = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    expected = [tokens.convert_tokens_to_ids(name) for name in names]
    expected += range(len(tokens), processor.vocab_size)
    assert list(processor.banned_token_ids()) == sorted(expected)
    assert processor.stop_token_ids == (tokens.convert_tokens_to_ids("<|im_end|>"),)
    assert set(processor.stop_token_ids).isdisjoint(processor.banned_token_ids())
    for allowed in ("<|endoftext|>", "<think>", "</answer>", "7"):
        assert tokens.convert_tokens_to_ids(allowed) not in processor.banned_token_ids()


def test_several_stop_tokens_are_read_from_the_generation_config(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 5]}))
    processor = Processor(str(tmp_path), CONFIG)
    assert processor.stop_token_ids == tuple(sorted({300, 5, processor.end_token_id}))


@pytest.mark.parametrize("legacy", [False, True])
def test_engine_directory_gives_the_same_ids_and_patches(model: Path, tmp_path: Path, legacy: bool) -> None:
    """Both layouts: transformers 5 keeps the image settings in processor_config.json, older checkpoints do not."""
    source, out = tmp_path / "source", tmp_path / "engine"
    source.mkdir()
    for file in model.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    if legacy:
        combined = json.loads((source / "processor_config.json").read_text())
        (source / "processor_config.json").unlink()
        (source / "preprocessor_config.json").write_text(json.dumps(combined["image_processor"]))
        template = (source / "chat_template.jinja").read_text()
        (source / "chat_template.jinja").unlink()
        (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours = Processor(str(source), CONFIG)
    ours.write_engine_dir(out)
    assert not list(out.glob("*.safetensors"))
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()

    from transformers import AutoImageProcessor, AutoTokenizer

    question = prompt("<image>Which digit is this?", encoded(picture(300, 200)))
    expected = ours.encode(question)
    theirs = AutoImageProcessor.from_pretrained(out, backend="pil")
    image: Image.Image = open_image(expected.images[0], 10**6)
    output = theirs(images=[image], return_tensors="np")
    assert np.array_equal(output["pixel_values"], expected.pixel_values)
    assert dict(theirs.size) == {"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(expected.engine_ids) == ours._tokenizer.decode(expected.engine_ids)
