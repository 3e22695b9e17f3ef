"""Each recipe's reward, worked out by hand: the corrected form, then the original with its mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mmrl.config import Config, ConfigError, dump_config, load_config
from megatron_mmrl.config.build import build
from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.config.reward_presets import PRESETS
from megatron_mmrl.rewards.compose import compose
from megatron_mmrl.rewards.forms import Sample
from megatron_mmrl.rewards.registry import build_gold_check, build_term
from megatron_mmrl.types import Prompt


def prompt(gold: str, **meta: object) -> Prompt:
    return Prompt(id="p", source="s", messages=(), images=(), answer=gold, meta=meta)


def total(config: RewardConfig, asked: Prompt, text: str) -> float:
    sample = Sample(prompt=asked, text=text, tokens=len(text), finish="stop")
    terms = {term.key: build_term(term.name, term.kwargs)(sample)[0] for term in config.terms}
    return compose(terms, {term.key: term.weight for term in config.terms}).total


GOOD = "<think>3 + 4</think>\n<answer>7</answer>"
LATEX = "<think>3 + 4</think>\n<answer>$7$</answer>"
LINES = "<think>3 + 4</think><answer>\n7\n</answer>"
WRONG = "<think>3 + 4</think><answer>8</answer>"
BARE = "it is 7"
CHATTY = "Sure! <think>3 + 4</think><answer>$7$</answer>"
HALF = "<REASONING>45</REASONING> <SOLUTION>7"
SOLVED = "<REASONING>so</REASONING>\n<SOLUTION>7</SOLUTION>"
SPACED = "<REASONING>so</REASONING>\n<SOLUTION> 7 </SOLUTION>"

# preset, gold, response, corrected total, the original's total
CASES = [
    ("siirl", "7", LATEX, 1.0, 0.95),
    ("siirl", "7", GOOD, 1.0, 0.05),  # the tags are parsed along and hide a number that touches them
    ("siirl", "7", LINES, 1.0, 0.95),
    ("siirl", "7", WRONG, 0.1, 0.05),
    ("siirl", "7", CHATTY, 1.0, 0.95),
    ("siirl", "7", BARE, 0.9, 0.9),
    ("siirl", "7", "<think></think><answer>$7$</answer>", 0.9, 0.9),  # an empty block is no good shape
    ("siirl", "not a number at all", WRONG, 0.1, 0.95),  # unparsable: rewarded by the original
    ("siirl", "not a number at all", "", 0.0, 0.9),
    ("siirl", "\\frac{1}{2}", "<think>a</think><answer>$0.5$</answer>", 1.0, 0.95),
    ("mm_eureka", "7", LATEX, 1.5, 1.5),
    ("mm_eureka", "7", GOOD, 1.5, 0.5),
    ("mm_eureka", "7", WRONG, 0.5, 0.5),
    ("mm_eureka", "7", BARE, 1.0, 1.0),
    ("mm_eureka", "", WRONG, 0.5, 1.5),
    ("mm_eureka", "", "", 0.0, 0.0),
    ("mm_eureka", "B", "<think>a</think><answer>(B)</answer>", 1.5, 1.5),
    ("mm_eureka", "B", "<think>a</think><answer>B or C</answer>", 0.5, 0.5),
    ("verl_boxed", "11", r"so \boxed{11}", 1.0, None),
    ("verl_boxed", "11", r"so \boxed{12}", 0.0, None),
    ("verl_boxed", "11", "so 11", -1.0, None),
    ("swift_r1v", "<answer> 3 </answer>", "<think>a</think><answer> 3 </answer>", 2.0, 2.0),
    ("swift_r1v", "<answer> 3 </answer>", "<think>a</think><answer>4</answer>", 1.0, 1.0),
    ("swift_r1v", "Alabama", "<think>a</think>\n<answer>Alabama</answer>", 2.0, 2.0),
    ("swift_r1v", "Alabama", "<think>a</think>\n<answer>\nAlabama\n</answer>", 2.0, 1.0),  # of several lines
    ("swift_r1v", "Alabama", "Alabama", 1.0, 1.0),
    ("swift_r1v", "7", GOOD + "\n", 2.0, 1.0),  # the line break at the end is no good shape
    ("swift_r1v", "\\frac{1}{2}", "<think>a</think><answer>\n$0.5$\n</answer>", 2.0, 2.0),
    ("gemma_math", "7", SOLVED, 4.0, 4.0),
    ("gemma_math", "7", SPACED, 4.0, 2.0),  # compared character by character
    ("gemma_math", "7.0", SOLVED, 4.0, 2.0),
    ("gemma_math", "8", SOLVED, 2.0, 2.0),
    ("gemma_math", "7", HALF, 1.0, 1.0),
    ("gemma_math", "7", SOLVED + "<SOLUTION>7</SOLUTION>", 1.0, 1.0),
    ("gemma_math", "7", "<REASONING>a<REASONING>b</REASONING>" + SOLVED[24:], 3.0, 4.0),  # opened twice
    ("gemma_math", "7", "", 0.0, 0.0),
]


@pytest.mark.parametrize(("preset", "gold", "text", "corrected", "original"), CASES)
def test_totals_by_hand(preset: str, gold: str, text: str, corrected: float, original: float | None) -> None:
    asked = prompt(gold)
    assert total(RewardConfig(preset=preset), asked, text) == pytest.approx(corrected)
    if original is not None:
        assert total(RewardConfig(preset=preset, legacy=True), asked, text) == pytest.approx(original)


def test_every_preset_is_tried() -> None:
    assert {case[0] for case in CASES} == set(PRESETS)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_gold_answers_that_mean_nothing_are_dropped_except_by_the_originals(preset: str) -> None:
    def accepts(config: RewardConfig, asked: Prompt) -> bool:
        checks = [build_gold_check(term.name, term.kwargs) for term in config.terms]
        return all(check(asked) for check in checks if check)

    assert accepts(RewardConfig(preset=preset), prompt("7"))
    assert not accepts(RewardConfig(preset=preset), prompt(" "))
    if preset != "verl_boxed":
        assert accepts(RewardConfig(preset=preset, legacy=True), prompt(" "))


def test_legacy_at_a_term() -> None:
    fmt = build_term("format", {"legacy": True})
    assert fmt(Sample(prompt=prompt("7"), text=GOOD, tokens=1, finish="stop")) == (0.5, {})
    unparsable = build_term("accuracy", {"legacy": "siirl"})
    assert unparsable(Sample(prompt=prompt("?"), text="no", tokens=1, finish="stop")) == (1.0, {})


def test_terms_are_filled_in_and_survive_a_dump(tmp_path: Path) -> None:
    assert [(term.name, term.weight) for term in RewardConfig().terms] == [("accuracy", 0.9), ("format", 0.1)]
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\nreward: {preset: gemma_math, legacy: true}\n")
    config = load_config(file)
    assert [(term.name, term.weight) for term in config.reward.terms] == [("format", 1.0), ("accuracy", 2.0)]
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"preset": "sirl"}, "reward.preset='sirl' is not known; use one of gemma_math, mm_eureka"),
        ({"preset": "siirl", "terms": [{"name": "boxed"}]}, "are both given and differ"),
        ({"legacy": True}, "only a reward.preset has an original"),
        ({"preset": "verl_boxed", "legacy": True}, "computes the same"),
        ({"terms": [{"name": "format"}, {"name": "format"}]}, r"names a reward twice.*label"),
        ({"max_memory_bytes": 5}, "max_memory_bytes=5"),
    ],
)
def test_configurations_that_cannot_be_meant(values: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(Config, {"model": {"path": "m"}, "reward": values})


def test_keys_of_terms() -> None:
    assert RewardTerm(name="accuracy").key == "accuracy"
    assert RewardTerm(name="pkg.mod:fn").key == "pkg.mod:fn"
    assert RewardTerm(name="/home/me/rewards.py:fn").key == "rewards:fn"
    assert RewardTerm(name="rewards.py:fn", label="mine").key == "mine"
    two = [RewardTerm(name="format"), RewardTerm(name="format", label="tags", kwargs={"tags": ["a", "b"]})]
    assert [term.key for term in RewardConfig(terms=two).terms] == ["format", "tags"]
