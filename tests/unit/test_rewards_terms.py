"""Format and accuracy of single responses, composition, and rewards by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_mmrl.rewards.accuracy import Accuracy, Boxed, accuracy
from megatron_mmrl.rewards.compose import compose, zero_score
from megatron_mmrl.rewards.extract import last_block, last_boxed
from megatron_mmrl.rewards.format import Format, think_answer_format
from megatron_mmrl.rewards.lengths import Length, Repetition, SoftOverlong
from megatron_mmrl.rewards.registry import build_term
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
    assert last_block(text, "answer") == answer


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
    assert not accuracy.accepts(prompt(gold))
    assert accuracy(prompt(gold), f"<answer>{gold}</answer>") == 0.0
    assert accuracy(prompt(gold), "<answer>1</answer>") == 0.0


@pytest.mark.parametrize("gold", ["7", "-3", "0.5", "1/2", "\\frac{1}{2}", "$x^2$", "A", "50%", "5 dollars", "1,000"])
def test_parsable_gold(gold: str) -> None:
    assert accuracy.accepts(prompt(gold))


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


OPTIONS = ["45\\degree", "30", "$\\frac{1}{2}$", "None of the above"]
SAID = ["B", "b", "(B)", "B.", "B)", "B: 30", "(B) 30", "B. 30 degrees", "option B", "The answer is (B).", "**B**"]
SAID += ["\\text{B}", "$B$", "30", "30.0", "\\frac{60}{2}", "Answer: B"]


@pytest.mark.parametrize("gold", ["B", "30"])
@pytest.mark.parametrize("answer", SAID)
def test_a_choice_may_be_named_in_many_ways(gold: str, answer: str) -> None:
    asked = replace(prompt(gold), meta={"choices": OPTIONS})
    assert accuracy(asked, f"<answer>{answer}</answer>") == 1.0


@pytest.mark.parametrize("gold", ["B", "30"])
@pytest.mark.parametrize(
    "answer",
    ["A", "C", "E", "(A) 30", "B: 45\\degree", "A bird", "45\\degree", "B or C", "AB", "", "none of the above", "3"],
)
def test_other_choices_and_half_choices_are_wrong(gold: str, answer: str) -> None:
    asked = replace(prompt(gold), meta={"choices": OPTIONS})
    assert accuracy(asked, f"<answer>{answer}</answer>") == 0.0


def test_options_that_carry_their_letters_and_golds_that_no_parser_reads() -> None:
    asked = replace(prompt("Alabama"), meta={"choices": ["(A) Texas", "(B) Alabama"]})
    assert accuracy.accepts(asked)
    assert accuracy(asked, "<answer>b</answer>") == 1.0
    assert accuracy(asked, "<answer>alabama.</answer>") == 1.0
    assert accuracy(asked, "<answer>A</answer>") == 0.0
    assert accuracy(asked, "<answer>B) Texas</answer>") == 0.0  # says two things
    assert Accuracy(multiple_choice=False)(asked, "<answer>b</answer>") == 0.0


def test_a_letter_alone_is_a_choice_without_options() -> None:
    assert accuracy(prompt("D"), "<answer>D. 45 degrees</answer>") == 1.0
    assert accuracy(prompt("D"), "<answer>C. 45 degrees</answer>") == 0.0
    both = Accuracy(extract=["answer", "text"])
    assert both(prompt("D"), "It cannot be C, so the answer is (D).") == 1.0
    assert both(prompt("D"), "It cannot be D, so the answer is (C).") == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{6} no, \boxed{7}", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed {7}", "7"),
        (r"{ \boxed{a} }", "a"),
        (r"\boxed{1} and \boxed{2", "1"),  # cut inside the second
        (r"\boxed{a{b} \boxed{c}", "c"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{}", ""),
        (r"\boxed 7", None),
        (r"\boxed{7", None),
        ("}}}", None),
        ("7", None),
    ],
)
def test_the_last_complete_box_is_taken(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_thousands_of_open_boxes_take_one_pass() -> None:
    assert last_boxed(r"\boxed{" * 200_000 + "7}") == "7"


def test_boxed_is_minus_one_zero_or_one() -> None:
    boxed = Boxed()
    assert boxed(prompt("1/2"), r"so \boxed{\frac{1}{2}}") == 1.0
    assert boxed(prompt("1/2"), r"\boxed{0.5}, or \boxed{2}") == 0.0
    assert boxed(prompt("1/2"), "so 1/2") == -1.0
    assert boxed(prompt("1/2"), "") == -1.0
    assert boxed(prompt("not a number"), r"\boxed{not a number}") == 0.0  # never rewarded
    assert not boxed.accepts(prompt("not a number"))
    assert boxed(replace(prompt("A"), meta={"choices": ["1", "2"]}), r"\boxed{1}") == 1.0


def test_other_places_for_the_answer() -> None:
    solution = Accuracy(extract="SOLUTION")
    assert solution(prompt(), "<SOLUTION>\n7\n</SOLUTION>") == 1.0
    assert solution(prompt(), "<answer>7</answer>") == 0.0
    several = Accuracy(extract=["answer", "boxed", "text"])
    assert several(prompt(), r"<answer>7</answer> \boxed{8}") == 1.0
    assert several(prompt(), r"it is \boxed{7} of 8") == 1.0
    assert several(prompt(), "the result is 7") == 1.0
    assert several(prompt(), "7 was a guess; <answer>8") == 0.0  # what follows the open tag counts
    assert Accuracy(extract="boxed")(prompt(), "<answer>7</answer>") == 0.0
    only = Accuracy(only_block=True)
    assert only(prompt(), "<answer>7</answer>") == 1.0
    assert only(prompt(), "<answer>6</answer><answer>7</answer>") == 0.0
    assert accuracy(prompt("<answer> 7 </answer>"), "<answer>7</answer>") == 1.0  # as some data sets keep it


def test_strings_count_where_they_are_asked_for() -> None:
    string = Accuracy(string=True)
    assert string.accepts(prompt("New York"))
    assert not string.accepts(prompt(" "))
    assert string(prompt("New York"), "<answer>New\n York </answer>") == 1.0
    assert string(prompt("New York"), "<answer>York</answer>") == 0.0
    assert string(prompt("1/2"), "<answer>0.5</answer>") == 1.0
    assert accuracy(prompt("New York"), "<answer>New York</answer>") == 0.0


def test_long_answers_reach_no_parser() -> None:
    short = Accuracy(max_answer_chars=10)
    assert short(prompt("7"), "<answer>7+0</answer>") == 1.0
    assert short(prompt("7"), "<answer>7+0+0+0+0+0</answer>") == 0.0


TWO = ["REASONING", "SOLUTION"]


@pytest.mark.parametrize(
    ("kwargs", "text", "value"),
    [
        ({"tags": TWO}, "<REASONING>a</REASONING>\n<SOLUTION>7</SOLUTION>", 1.0),
        ({"tags": TWO}, "<think>a</think><answer>7</answer>", 0.0),
        ({"tags": TWO, "per_block": True}, "<REASONING>a</REASONING>\n<SOLUTION>7</SOLUTION>", 2.0),
        ({"tags": TWO, "per_block": True}, "so <SOLUTION>7</SOLUTION> <REASONING>a</REASONING> then", 2.0),
        ({"tags": TWO, "per_block": True}, "<REASONING>a</REASONING><SOLUTION>7", 1.0),
        ({"tags": TWO, "per_block": True}, "<SOLUTION>6</SOLUTION><SOLUTION>7</SOLUTION>", 0.0),
        ({"tags": TWO, "per_block": True}, "</SOLUTION>7<SOLUTION>", 0.0),
        ({"strict": False}, "well <think>a</think> <answer>7</answer>.", 1.0),
        ({"strict": False}, "<think>a</think> so <answer>7</answer>", 0.0),
        ({"strict": False}, "<answer>7</answer><think>a</think>", 0.0),
        ({"strict": False}, "<think>a</think><answer>7</answer><answer>7</answer>", 0.0),
        ({"allow_empty": False}, "<think></think><answer>7</answer>", 0.0),
        ({"allow_empty": False}, "<think>a</think><answer>7</answer>", 1.0),
        ({"tags": ["a", "b", "c"]}, "<a>1</a><b>2</b>\n<c>3</c>", 1.0),
        ({"tags": ["a", "b", "c"]}, "<a>1</a><c>3</c><b>2</b>", 0.0),
    ],
)
def test_format_of_other_tags_and_looser_ones(kwargs: dict, text: str, value: float) -> None:
    assert Format(**kwargs)(prompt(), text) == value


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (60, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (500, -1.0)],
)
def test_soft_overlong_by_hand(tokens: int, value: float) -> None:
    """DAPO equation 13 with L_max = 100 and L_cache = 20."""
    assert SoftOverlong(max_tokens=100, cache_tokens=20)(prompt(), "", response_tokens=tokens) == pytest.approx(value)


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.0), (10, 0.0), (20, 0.25), (50, 1.0), (90, 1.0)])
def test_length_by_hand(tokens: int, value: float) -> None:
    assert Length(max_tokens=50, min_tokens=10)(prompt(), "", response_tokens=tokens) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        ("a b", 0.0),
        ("a b c d e", 0.0),
        ("a a a a a", -2 / 3),  # three 3-grams, one of them new
        ("a b c A B C", -0.25),  # abc bca cab abc: one of four came before
        ("a b c " * 50, -(1 - 3 / 148)),
    ],
)
def test_repetition_by_hand(text: str, value: float) -> None:
    assert Repetition()(prompt(), text) == pytest.approx(value)
    assert Repetition(max_penalty=-2.0)(prompt(), text) == pytest.approx(2 * value)


def test_repetition_of_words_and_its_invariance() -> None:
    assert Repetition(ngram=1)(prompt(), "a b a b") == -0.5
    assert Repetition(ngram=1)(prompt(), "b a\n\nb  a") == -0.5  # neither spacing nor names matter


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("accuracy", {"extract": []}, "extract is empty"),
        ("accuracy", {"extract": "<answer>"}, "without < and >"),
        ("accuracy", {"extract": ["text", "answer"]}, "nothing after text"),
        ("accuracy", {"legacy": "verl"}, "legacy='verl' is not known; use one of siirl, mm_eureka"),
        ("accuracy", {"strng": True}, "strng"),
        ("format", {"tags": "think"}, "expected a list"),
        ("format", {"tags": ["a", "a"]}, "named twice"),
        ("format", {"weight": 2}, "it has tags, strict"),
        ("boxed", {"extract": "answer"}, "extract"),
        ("soft_overlong", {}, "max_tokens"),
        ("soft_overlong", {"max_tokens": 10, "cache_tokens": 20}, "cache_tokens=20 must be"),
        ("length", {"max_tokens": 5, "min_tokens": 5}, "min_tokens=5 must be"),
        ("repetition", {"ngram": 0}, "ngram=0"),
        ("repetition", {"max_penalty": 1.0}, "at most 0"),
    ],
)
def test_kwargs_that_a_term_cannot_use(name: str, kwargs: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_term(name, kwargs)


def test_rewards_load_neither_torch_nor_math_verify() -> None:
    code = (
        "import sys; import megatron_mmrl.rewards.pool, megatron_mmrl.rewards.worker; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'math_verify', 'sympy')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
