"""Which tensors an entry of ``model.freeze`` means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mmrl.config import ConfigError, load_config
from megatron_mmrl.models.parts import frozen_names, part_of

NAMES = (
    "visual.patch_embed.proj.weight",
    *(f"visual.blocks.{block}.attn.qkv.weight" for block in range(12)),
    "visual.merger.ln_q.weight",
    "visual.merger.mlp.0.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def config_with(tmp_path: Path, *overrides: str) -> object:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\n")
    return load_config(file, overrides)


def test_every_name_belongs_to_one_part() -> None:
    parts = {part: [name for name in NAMES if part_of(name) == part] for part in ("vision", "merger", "language")}
    assert [len(names) for names in parts.values()] == [13, 2, 5]
    assert frozen_names(NAMES, ["vision"]) == set(parts["vision"])
    assert frozen_names(NAMES, ["merger", "vision"]) == set(parts["vision"] + parts["merger"])
    assert frozen_names(NAMES, []) == set()


def test_an_expression_matches_whole_names() -> None:
    assert frozen_names(NAMES, [r"re:visual\.blocks\.1\..*"]) == {"visual.blocks.1.attn.qkv.weight"}  # not 10 and 11
    assert frozen_names(NAMES, [r"re:(model\.embed_tokens|lm_head)\.weight", "merger"]) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.0.weight",
    }


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            ["vision", r"re:visual\.block"],
            r"model.freeze[1]='re:visual\\.block' matches no tensor of the model (an expression must match the whole "
            "name); there are lm_head.weight, model.embed_tokens.weight, model.layers.N.self_attn.q_proj.weight, "
            "model.norm.weight, visual.blocks.N.attn.qkv.weight, visual.merger.ln_q.weight, visual.merger.mlp.N.weight,"
            " visual.patch_embed.proj.weight, where N is any number",
        ),
        (
            ["language", "re:visual.*"],
            "model.freeze=['language', 're:visual.*'] matches all 20 tensors: nothing would train",
        ),
    ],
)  # fmt: skip
def test_what_matches_nothing_or_everything_is_refused(freeze: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        frozen_names(NAMES, freeze)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.freeze=[vison]",
            "model.freeze[0]='vison': must be one of vision, merger, language, or re: and a regular expression for "
            "tensor names",
        ),
        (
            "model.freeze=[vision,'re:visual.(']",
            "model.freeze[1]='re:visual.(' is no regular expression: missing ), unterminated subpattern at position 7",
        ),
        (
            "model.freeze=[language,merger,vision]",
            "model.freeze=['language', 'merger', 'vision']: leaves nothing to train",
        ),
        ("model.image_cache_bytes=-1", "model.image_cache_bytes=-1: must be at least 0"),
        (
            "supervised.optim.lr_scale.vision=0",
            "supervised.optim.lr_scale.vision=0.0: must be above 0; model.freeze=[vision] stops it",
        ),
    ],
)
def test_the_configuration_refuses_it_before_anything_is_loaded(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_with(tmp_path, override)
    assert str(error.value) == message
