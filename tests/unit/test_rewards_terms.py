"""Format and accuracy of single responses, composition, and rewards by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mmrl.rewards.accuracy import accuracy, extract_answer, gold_is_parsable
from megatron_mmrl.rewards.compose import compose, zero_score
from megatron_mmrl.rewards.format import think_answer_format
from megatron_mmrl.rewards.registry import build_reward, check_reward_name
from megatron_mmrl.types import Prompt


def prompt(answer: str = "7") -> Prompt:
    return Prompt(id="p", source="s", messages=(), images=(), answer=answer)


@pytest.mark.parametrize(
    "text",
    [
        "<think>it is seven</think><answer>7</answer>",
        "<think>a\nb\n</think>\n\n<answer>\n7\n</answer>",
        " \n<think>a</think> <answer>7</answer>\n",
        "<think></think><answer></answer>",
        "<think>1 < 2 and 3 > 2</think><answer>7</answer>",
    ],
)
def test_format_accepts(text: str) -> None:
    assert think_answer_format(prompt(), text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "<answer>7</answer>",
        "<think>a</think>",
        "<think>a</think>7",
        "<answer>7</answer><think>a</think>",
        "<think>a</think>so<answer>7</answer>",
        "well<think>a</think><answer>7</answer>",
        "<think>a</think><answer>7</answer>.",
        "<think>a</think><answer>7</answer><answer>7</answer>",
        "<think>a</think><think>a</think><answer>7</answer>",
        "<think>a<think>b</think><answer>7</answer>",
        "<think>a<answer>7</answer></think>",
        "<think>a</think><answer>7",
        "<think>a<answer></think>7</answer>",
        "<Think>a</Think><answer>7</answer>",
    ],
)
def test_format_refuses(text: str) -> None:
    assert think_answer_format(prompt(), text) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("<answer>\n 7 \n</answer>", "7"),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<answer>6</answer> no, <answer>7</answer>", "7"),
        ("<answer>6<answer>7</answer>", "7"),
        ("<answer>6</answer></answer>", "6</answer>"),
        ("<answer>6</answer><answer>7", "6"),
        ("<answer></answer>", ""),
        ("7", None),
        ("<answer>7", None),
        ("7</answer>", None),
        ("</answer><answer>", None),
        ("", None),
    ],
)
def test_the_last_complete_answer_is_taken(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "7"),
        ("7", " 7\n"),
        (" 7 ", "7"),
        ("1/2", "0.5"),
        ("0.5", "1/2"),
        ("$\\frac{1}{2}$", "0.5"),
        ("\\frac{1}{2}", "$\\frac12$"),
        ("1/2", "\\boxed{\\frac{1}{2}}"),
        ("12", "12.0"),
        ("1000", "1,000"),
        ("60^\\circ", "60"),
        ("3 cm", "3"),
        ("x^2+1", "1 + x^2"),
        ("sqrt(2)", "\\sqrt{2}"),
        ("{1,2}", "{2,1}"),
        ("A", "A"),
        ("A", "\\text{A}"),
        ("7", "\\begin{matrix}\n7\n\\end{matrix}"),
    ],
)
def test_right_answers(gold: str, answer: str) -> None:
    assert accuracy(prompt(gold), f"<think>hm</think><answer>{answer}</answer> trailing text") == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "8"),
        ("7", "-7"),
        ("7", ""),
        ("7", "seven"),
        ("7", "3 4"),  # two digits beside each other are not their sum
        ("24", "7 8 9"),
        ("7", "1 2 3 4 5 6 7"),
        ("7", "6 8 7"),
        ("1/2", "0.51"),
        ("1+x^2", "1"),  # read as a whole, not number by number
        ("2:30", "2:45"),
        ("A", "B"),
        ("(1,2)", "(2,1)"),
    ],
)
def test_wrong_answers(gold: str, answer: str) -> None:
    assert accuracy(prompt(gold), f"<answer>{answer}</answer>") == 0.0


def test_only_the_answer_block_counts() -> None:
    assert accuracy(prompt(), "7") == 0.0
    assert accuracy(prompt(), "The answer is $\\boxed{7}$") == 0.0
    assert accuracy(prompt(), "<think>7</think><answer>8</answer>7") == 0.0
    assert accuracy(prompt(), "<answer>7</answer>, or rather <answer>8</answer>") == 0.0


@pytest.mark.parametrize("gold", ["", "  ", "cat", "yes", "not a number", "?", "1 2 3", "1 1/2"])
def test_unparsable_gold_is_never_rewarded(gold: str) -> None:
    assert not gold_is_parsable(gold)
    assert accuracy(prompt(gold), f"<answer>{gold}</answer>") == 0.0
    assert accuracy(prompt(gold), "<answer>1</answer>") == 0.0


@pytest.mark.parametrize("gold", ["7", "-3", "0.5", "1/2", "\\frac{1}{2}", "$x^2$", "A", "50%", "5 dollars", "1,000"])
def test_parsable_gold(gold: str) -> None:
    assert gold_is_parsable(gold)


def test_composition_is_a_weighted_sum() -> None:
    score = compose({"accuracy": 1.0, "format": 1.0}, {"accuracy": 0.9, "format": 0.1})
    assert score.total == 1.0
    assert score.terms == {"accuracy": 1.0, "format": 1.0}
    assert score.error is None
    # weights are not normalised: 2 x 0.5 - 3 x 1 = -2
    assert compose({"a": 0.5, "b": 1.0}, {"a": 2.0, "b": -3.0}).total == -2.0


def test_equal_terms_give_equal_totals_in_any_order() -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.3}
    forwards = compose({"a": 1.0, "b": 1.0, "c": 1.0}, weights)
    assert forwards.total == compose({"c": 1.0, "b": 1.0, "a": 1.0}, weights).total


def test_composition_needs_the_same_terms() -> None:
    with pytest.raises(ValueError, match="accuracy"):
        compose({"accuracy": 1.0}, {"accuracy": 0.9, "format": 0.1})


def test_zero_score_names_every_term() -> None:
    score = zero_score({"accuracy": 0.9, "format": 0.1}, "too slow")
    assert (score.total, score.terms, score.error) == (0.0, {"accuracy": 0.0, "format": 0.0}, "too slow")


def test_rewards_by_name() -> None:
    assert build_reward("accuracy", {})(prompt(), "<answer>7</answer>") == 1.0
    with pytest.raises(ValueError, match="did you mean accuracy"):
        build_reward("acuracy", {})
    with pytest.raises(ValueError, match="known: accuracy, format"):
        check_reward_name("zzz")
    with pytest.raises(ValueError, match="not known"):
        check_reward_name("../evil:run")


def test_user_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_rewards.py").write_text(
        "LIMIT = 3\ndef brevity(prompt, text, *, limit=5):\n    return float(len(text) <= limit)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_reward_name("user_rewards:brevity")
    assert build_reward("user_rewards:brevity", {})(prompt(), "12345") == 1.0
    assert build_reward("user_rewards:brevity", {"limit": 4})(prompt(), "12345") == 0.0
    with pytest.raises(ValueError, match="limt"):
        build_reward("user_rewards:brevity", {"limt": 4})
    with pytest.raises(ValueError, match="no function length"):
        build_reward("user_rewards:length", {})
    with pytest.raises(ValueError, match="no function LIMIT"):
        build_reward("user_rewards:LIMIT", {})
    with pytest.raises(ValueError, match="cannot import no_such_module"):
        build_reward("no_such_module:length", {})


def test_built_in_terms_take_no_kwargs() -> None:
    with pytest.raises(ValueError, match="weight"):
        build_reward("format", {"weight": 2})


def test_rewards_load_neither_torch_nor_math_verify() -> None:
    code = (
        "import sys; import megatron_mmrl.rewards.pool, megatron_mmrl.rewards.worker; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'math_verify', 'sympy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
