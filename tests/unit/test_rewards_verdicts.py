"""The pool's verdicts, with its fast paths, caches and processes, against math-verify called one pair after another."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.rewards import mathematics
from megatron_mmrl.rewards.mathematics import hurry_latex_parser, parse_answer, plain_number, same_plain_numbers
from megatron_mmrl.rewards.pool import RewardPool
from megatron_mmrl.rewards.registry import REWARDS
from megatron_mmrl.types import Prompt
from tests.unit.reward_pairs import PAIRS
from tests.unit.test_rewards_pool import group

# Where verdicts differ, and why: words are not read as products of letters, nor is a number looked for among them.
DIFFERENT = {("\\{1,2\\}", "1 and 2"), ("x^2", "xx")}
HANGS = ["9^{9^{9^{9}}}", "8^{9^{9^{9}}}"]


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    terms = [RewardTerm(name="accuracy", kwargs={"multiple_choice": False})]
    with RewardPool(RewardConfig(terms=terms, num_workers=2, timeout_s=20)) as made:
        yield made


def verdicts(pool: RewardPool, pairs: list[tuple[str, str]]) -> list[float]:
    groups = [
        group([f"<answer>{answer}</answer>"], answer=gold, name=f"p{n}") for n, (gold, answer) in enumerate(pairs)
    ]
    return [score.total for each in pool.score(groups) for score in each.scores or ()]


def serial(gold: str, answer: str) -> float:
    """What math-verify says of two answers that are each read as a whole, with nothing else around it."""
    from math_verify import parse, verify

    def read(text: str) -> list:
        whole = text if re.search(r"\$|\\boxed|\\\(|\\\[", text) else f"${text}$"
        return parse(whole, parsing_timeout=None)

    return float(verify(read(gold), read(answer), timeout_seconds=None))


def test_verdicts_are_those_of_serial_math_verify(pool: RewardPool) -> None:
    assert len(set(PAIRS) - DIFFERENT) > 200
    assert set(PAIRS) > DIFFERENT
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    truth = [serial(gold, answer) for gold, answer in PAIRS]
    assert 100 < sum(truth) < len(PAIRS) - 80
    ours = verdicts(pool, PAIRS)
    differing = {pair for pair, mine, theirs in zip(PAIRS, ours, truth, strict=True) if mine != theirs}
    assert differing == DIFFERENT
    shuffled = list(range(len(PAIRS)))
    random.Random(1).shuffle(shuffled)
    assert verdicts(pool, [PAIRS[n] for n in shuffled]) == [ours[n] for n in shuffled]  # now out of the cache


def test_plain_numbers_are_compared_as_math_verify_does(pool: RewardPool) -> None:
    """The fast path decides these alone; the parser is asked here to make sure."""
    draw = random.Random(2)
    numbers = ["0", "-0", "1", "-1", "0.5", "0.50", "0.500001", "100", "100.0", "999999999", "999999998.999999"]
    numbers += [f"{draw.uniform(-50, 50):.{draw.randrange(7)}f}" for _ in range(12)]
    fractions = [
        "1/2",
        "2/4",
        "-1/2",
        "-\\frac{1}{2}",
        "\\frac{2}{4}",
        "\\dfrac{6}{3}",
        "0/5",
        "7/1",
        "1/3",
        "\\frac{0}{2}",
    ]
    pairs = [(draw.choice(numbers), draw.choice(numbers)) for _ in range(60)]
    pairs += [(one, other) for one in fractions for other in [*fractions, "2", "0", "7", "0.5", "0.333333", "-0.5"]]
    pairs += [(other, one) for one in fractions for other in ["2", "0", "7", "0.5", "0.333333", "-0.5"]]
    pairs += [(number, number.rstrip("0") if "." in number else f"{number}.0") for number in numbers]
    pairs = [(gold, answer) for gold, answer in pairs if plain_number(gold) is not None]
    assert verdicts(pool, pairs) == [serial(gold, answer) for gold, answer in pairs]


def test_fractions_and_decimals_need_math_verify_only_where_they_nearly_agree(pool: RewardPool) -> None:
    draw = random.Random(3)
    pairs = [("1/3", "0.333333"), ("2/3", "0.666666"), ("0.5", "1/2"), ("-0.125", "\\frac{1}{8}")]
    for _ in range(150):
        places = draw.randrange(1, 7)
        decimal = (
            f"{draw.choice(['', '-'])}{draw.randrange(10 ** draw.randrange(9))}.{draw.randrange(10**places):0{places}}"
        )
        value, factor = Fraction(decimal), draw.choice([1, 2, 7])
        near = value + draw.choice([-1, 1]) * Fraction(draw.choice(["0.0000009", "0.00001", "0.000011", "0.001", "1"]))
        for number in (value, Fraction(round(near * 10**7), 10**7)):
            fraction = f"{number.numerator * factor}/{number.denominator * factor}"
            pairs += [(decimal, fraction), (fraction, decimal)]
    pairs = [(gold, answer) for gold, answer in pairs if plain_number(gold) is not None]
    assert verdicts(pool, pairs) == [serial(gold, answer) for gold, answer in pairs]
    told = [same_plain_numbers(gold, answer) for gold, answer in pairs]
    assert told[:2] == [None, None]
    assert min(told.count(True), told.count(False), told.count(None)) > 20


SHORTCUTS = [
    ("accuracy", {}),
    ("accuracy", {"extract": ["answer", "text"]}),
    ("accuracy", {"string": True, "max_answer_chars": 3}),
    ("accuracy", {"multiple_choice": False, "only_block": True}),
    ("boxed", {}),
    ("benchmark", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), SHORTCUTS)
def test_what_is_told_at_once_is_what_the_term_says(name: str, kwargs: dict) -> None:
    term, told = REWARDS[name](**kwargs), 0
    answers = ["7", "7.0", "07", "14/2", "\\frac{7}{1}", "8", "B", "(b)", "b.", "C", "the answer is B", "x", "", "0.5"]
    for gold in ["7", "1/2", "B", "x^2", "cat", "", "<answer>7</answer>", "\\boxed{7}", "1" * 70]:
        for answer in [*answers, gold, "1" * 70]:
            for text in (
                f"<answer>{answer}</answer>",
                f"\\boxed{{{answer}}}",
                f"so it is {answer}",
                f"<answer>{answer}",
            ):
                for meta in ({}, {"choices": ["6", "7", "8"]}, {"answers": ["7"]}):
                    prompt = Prompt(id="p", source="s", messages=(), images=(), answer=gold, meta=meta)
                    value = term.at_once(prompt, text)
                    assert value in (None, term(prompt, text)), (gold, text, meta)
                    told += value is not None
    assert (told == 0) == (name == "benchmark")


def test_a_parser_in_two_stages_reads_what_a_parser_in_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sorted({text for pair in PAIRS for text in pair})
    expected = [repr(parse_answer(text)) for text in texts]
    one_stage, stages = _Latex2Sympy.create_parser, []
    monkeypatch.setattr(_Latex2Sympy, "create_parser", lambda *args: stages.append(args) or one_stage(*args))
    monkeypatch.setattr(mathematics, "_slow_parsers", [])
    hurry_latex_parser()
    hurry_latex_parser()  # nothing more
    assert [repr(parse_answer(text)) for text in texts] == expected
    for text, needed in (("(1,40)", 1), ("x=40", 1), ("x^2+40", 2), ("x_1+40", 2)):
        stages.clear()
        assert parse_answer(text) != []
        assert len(stages) == needed, text


def test_a_hang_costs_its_limit_once() -> None:
    """At most twice, where other things keep the machine so busy that it hardly ran the first time."""
    with RewardPool(RewardConfig(num_workers=1, timeout_s=2.0)) as pool:
        hangs = [("7", hang) for hang in HANGS] * 3
        for _ in range(2):
            assert verdicts(pool, hangs) == [0.0] * 6
            assert pool.counters() == {"reward/timeouts": 6.0, "reward/errors": 0.0}
        pids = pool.worker_pids
        assert verdicts(pool, hangs) == [0.0] * 6
        assert pool.worker_pids == pids  # nothing was tried again, so nobody had to be killed
        assert pool.counters()["reward/timeouts"] == 6.0
