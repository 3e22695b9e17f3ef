"""The answer rules of the evaluation sets, each with answers that must count and answers that must not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mmrl.rewards.benchmark import Benchmark, number
from megatron_mmrl.rewards.registry import build_gold_check, build_term
from megatron_mmrl.types import Prompt


def judged(gold: str, response: str, **meta: Any) -> float:
    prompt = Prompt(id="p", source="s", messages=(), images=(), answer=gold, meta=meta)
    return Benchmark()(prompt, response)


FLOAT = {"answer_type": "float", "precision": 1.0, "question_type": "free_form"}
INTEGER = {"answer_type": "integer", "precision": None}  # as the published rows have it
TWO = {"answers": ["$2$", "$\\frac{1}{2}$"]}


@pytest.mark.parametrize(
    ("gold", "response", "meta", "right"),
    [
        # MathVista: rounding, options by text
        ("1.2", "<answer>1.23</answer>", FLOAT, 1),
        ("1.2", "<answer>1.26</answer>", FLOAT, 0),
        ("1.2", r"So \boxed{1.18 \text{ cm}}.", {**FLOAT, "unit": "cm"}, 1),
        ("4", "<answer>4.9</answer>", INTEGER, 1),
        ("4", "<answer>5</answer>", INTEGER, 0),
        ("4", r"\boxed{-4.9}", INTEGER, 0),
        ("4", r"\boxed{4.9}", {**INTEGER, "precision": 0.0}, 1),
        ("1200", "<answer>1,200</answer>", INTEGER, 1),
        ("145\u00b0", "<answer>B</answer>", {"choices": ["135\u00b0", "145\u00b0"]}, 1),
        ("145\u00b0", "<answer>135\u00b0</answer>", {"choices": ["135\u00b0", "145\u00b0"]}, 0),
        ("[2, 3]", "<answer>[2, 3]</answer>", {"answer_type": "list"}, 1),
        # MathVerse, We-Math, MMK12, GPQA: letters
        ("B", "<answer>(B) 50\u00b0</answer>", {"choices": ["25\u00b0", "50\u00b0"]}, 1),
        ("B", "<answer>50\u00b0</answer>", {"choices": ["25\u00b0", "50\u00b0"]}, 1),
        ("B", "<answer>A</answer>", {"choices": ["25\u00b0", "50\u00b0"]}, 0),
        ("D", "I think that the answer is D.", {}, 1),
        ("D", "<answer>C</answer> D", {}, 0),
        # OlympiadBench: tolerance, several answers, units
        ("9.8", r"\boxed{9.71}", {"answers": ["9.8"], "tolerance": 0.1}, 1),
        ("9.8", r"\boxed{9.6}", {"answers": ["9.8"], "tolerance": 0.1}, 0),
        ("$2$, $1/2$", r"\boxed{\frac{1}{2}, 2}", {"answers": ["$2$", "$\\frac{1}{2}$"]}, 1),
        ("$2$, $1/2$", r"\boxed{2}", {"answers": ["$2$", "$\\frac{1}{2}$"]}, 0),
        ("$2$, $1/2$", r"\boxed{2, 0.5, 7}", {"answers": ["$2$", "$\\frac{1}{2}$"]}, 0),
        ("$2$, $1/2$", r"Either \boxed{2} or \boxed{\frac{1}{2}}.", TWO, 1),
        ("$2$, $1/2$", r"First \boxed{7}. So \boxed{0.5}, and \boxed{2}.", TWO, 1),
        ("$2$, $1/2$", r"\boxed{2}, \boxed{0.5}, \boxed{7}", TWO, 0),
        ("$2$, $1/2$", r"\boxed{2}, \boxed{2}", TWO, 0),
        ("$2$, $1/2$", r"\boxed{2}, \boxed{0.5} <answer>2</answer>", TWO, 0),
        ("$2$, $2$", r"\boxed{2}", {"answers": ["$2$", "$2$"]}, 0),
        ("(1,2), (3,4)", r"\boxed{(3,4), (1,2)}", {"answers": ["$(1,2)$", "$(3,4)$"]}, 1),
        ("$1$, $3$", "<answer>x = 3 or x = 1.05</answer>", {"answers": ["$1$", "$3$"], "tolerance": 0.1}, 1),
        ("$1$, $3$", "<answer>3 and 1.2</answer>", {"answers": ["$1$", "$3$"], "tolerance": 0.1}, 0),
        # text sets
        ("204", r"... \boxed{204}", {}, 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", {}, 1),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", {}, 1),
        (r"\text{Evelyn}", r"\boxed{evelyn}", {}, 1),
        (r"$\text{Evelyn}$", "<answer>Eva</answer>", {}, 0),
        (r"\text{(C)}", r"\boxed{C}", {}, 1),
        (r"\text{(C)}", r"\boxed{\text{(B)}}", {}, 0),
        (r"\text{east}", "It is not the east.", {}, 0),
        ("204", "no answer here", {}, 0),
    ],
)
def test_rules(gold: str, response: str, meta: dict[str, Any], right: int) -> None:
    assert judged(gold, response, **meta) == right


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3.0), ("1,234.5", 1234.5), (r"\frac{1}{4}", 0.25), ("x = -2", -2.0), ("12\u00b0", 12.0), ("50\\%", 50.0),
     ("two", None), ("1e999", None), ("x+1", None), ("", None)],
)  # fmt: skip
def test_numbers(text: str, value: float | None) -> None:
    assert number(text) == value


def test_no_question_is_left_out() -> None:
    check = build_gold_check("benchmark", {})
    assert check is not None
    assert check(Prompt(id="p", source="s", messages=(), images=(), answer="cat and dog"))
    build_term("benchmark", {"extract": "boxed"})
