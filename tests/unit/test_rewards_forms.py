"""Users' rewards: found by name, told apart by signature, called in their own form, refused before a run starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.rewards.check import check_rewards
from megatron_mmrl.rewards.forms import Outcome, Sample, adapt
from megatron_mmrl.rewards.pool import RewardPool
from megatron_mmrl.rewards.registry import build_term, check_reward_name
from megatron_mmrl.types import Message, Prompt

FILE = '''
from __future__ import annotations
from dataclasses import dataclass
from beside import FACTOR

def ours(prompt, response_text, *, bonus=0.0):
    return float(response_text == prompt.answer) + bonus

def lengths(prompt, text, response_tokens, finish):
    return response_tokens if finish == "stop" else -response_tokens

def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    right = solution_str == ground_truth
    return {"score": scale * right, "acc": right, "row": extra_info["index"], "pred": solution_str, "src": data_source}

def short_score(predict_str, ground_truth):
    return FACTOR * float(predict_str == ground_truth)

def batch(completions, **kwargs):
    return [len(text) + sum(kwargs["ratio"]) for text in completions]

def trl(prompts, completions, answer, **kwargs):
    return [2.0 if text == gold and chat[0]["role"] == "user" else 0.0
            for chat, text, gold in zip(prompts, completions, answer)]

class Accuracy:
    """ms-swift's form."""
    def __init__(self, args=None, *, right=1.0):
        self.right = right

    def __call__(self, completions, solution, **kwargs) -> list[float]:
        return [self.right if text == gold else 0.0 for text, gold in zip(completions, solution)]

@dataclass
class Penalty:
    per_char: float
    def __call__(self, prompt, text):
        return -self.per_char * len(text)

class NotCallable:
    pass

def one(text):
    return 1.0

def unlike(a, *, completions_of):
    return 1.0

def two(completions):
    return [1.0, 2.0]

def needy(completions, difficulty):
    return [float(difficulty[0])]

def wordy(solution_str, ground_truth):
    return {"pred": "x"}

VALUE = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my rewards")
    (folder / "beside.py").write_text("FACTOR = 3.0\n")
    (folder / "mine.py").write_text(FILE)
    (folder / "missing.py").write_text("import no_such_package\n")
    return folder / "mine.py"


def sample(text: str, *, gold: str = "7", tokens: int = 5, finish: str = "stop", **meta: object) -> Sample:
    prompt = Prompt(
        id="f:1", source="geo", messages=(Message(role="user", text="?"),), images=(), answer=gold, meta=meta
    )
    return Sample(prompt=prompt, text=text, tokens=tokens, finish=finish)


@pytest.mark.parametrize(
    ("name", "kwargs", "asked", "outcome"),
    [
        ("ours", {}, sample("7"), (1.0, {})),
        ("ours", {"bonus": 0.5}, sample("8"), (0.5, {})),
        ("lengths", {}, sample("7", tokens=9), (9.0, {})),
        ("lengths", {}, sample("7", tokens=9, finish="length"), (-9.0, {})),
        ("compute_score", {}, sample("7", index=4), (1.0, {"acc": 1.0, "row": 4.0})),
        ("compute_score", {"scale": 0.5}, sample("7", index=4), (0.5, {"acc": 1.0, "row": 4.0})),
        ("compute_score", {}, sample("8", index=2), (0.0, {"acc": 0.0, "row": 2.0})),
        ("short_score", {}, sample("7"), (3.0, {})),
        ("batch", {}, sample("four", ratio=0.5), (4.5, {})),
        ("trl", {}, sample("7"), (2.0, {})),
        ("Accuracy", {}, sample("7"), (1.0, {})),
        ("Accuracy", {}, sample("<a>7</a>", solution="<a>7</a>"), (1.0, {})),  # the row's own column
        ("Accuracy", {"right": 4.0}, sample("7"), (4.0, {})),
        ("Penalty", {"per_char": 0.25}, sample("four"), (-1.0, {})),
        ("one", {"style": "mmrl"}, None, None),
        ("needy", {}, sample("7", difficulty=3), (3.0, {})),
    ],
)
def test_every_form_is_called_as_it_wants(
    file: Path, name: str, kwargs: dict, asked: Sample | None, outcome: Outcome | None
) -> None:
    if asked is None:
        with pytest.raises(ValueError, match="cannot be called as"):
            build_term(f"{file}:{name}", kwargs)
        return
    assert build_term(f"{file}:{name}", kwargs)(asked) == outcome


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("one", {}, r"has the parameters \['text'\], which is none of"),
        ("unlike", {}, "none of"),
        ("absent", {}, "has no function absent"),
        ("VALUE", {}, "has no function VALUE"),
        ("NotCallable", {}, "cannot be called"),
        ("Penalty", {}, "class cannot be made with {}.*per_char"),
        ("ours", {"bonsu": 1}, "bonsu"),
        ("compute_score", {"scael": 1}, "scael"),
        ("needy", {"extra": 1}, "takes no extra"),
        ("ours", {"style": "swift"}, "needs a parameter completions"),
        ("ours", {"style": "trl"}, "style='trl' is not known; use one of mmrl, verl, swift"),
    ],
)
def test_what_cannot_be_called_is_refused(file: Path, name: str, kwargs: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_term(f"{file}:{name}", kwargs)


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("two", sample("7"), "a list of 1 reward, got"),
        ("needy", sample("7"), "no column difficulty, only"),
        ("wordy", sample("7"), "must have a score"),
    ],
)
def test_what_a_call_shows_to_be_wrong(file: Path, name: str, asked: Sample, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_term(f"{file}:{name}", {})(asked)


def test_names(file: Path) -> None:
    with pytest.raises(ValueError, match="did you mean accuracy"):
        check_reward_name("acuracy")
    with pytest.raises(ValueError, match="known: accuracy, format, boxed"):
        check_reward_name("zzz")
    for name in ("../evil:run", "a b:run", "mod:", "mod:1", ":f", "a/b:f"):
        with pytest.raises(ValueError, match="not known"):
            check_reward_name(name)
    with pytest.raises(ValueError, match="there is no file"):
        check_reward_name(f"{file.parent}/other.py:ours")
    with pytest.raises(ValueError, match=r"cannot import .*no_such_package"):
        build_term(f"{file.parent}/missing.py:f", {})
    with pytest.raises(ValueError, match=r"cannot import no_such_module .*PYTHONPATH"):
        build_term("no_such_module:f", {})


def test_the_form_of_a_lambda_and_of_a_bound_method() -> None:
    assert adapt("x", lambda prompt, text: len(text), {})(sample("four")) == (4.0, {})
    assert adapt("x", lambda *arguments: 1, {})(sample("four")) == (1.0, {})
    with pytest.raises(ValueError, match="parameters"):
        adapt("x", min, {})


def test_extras_are_scored_logged_and_count_for_nothing(file: Path) -> None:
    from tests.unit.test_rewards_pool import group

    terms = [RewardTerm(name=f"{file}:compute_score", weight=2.0), RewardTerm(name=f"{file}:lengths", weight=0.5)]
    (scored,) = (group(["7", "8"]),)
    with RewardPool(RewardConfig(terms=terms)) as pool:
        (scored,) = pool.score([group(["7", "8"], meta={"index": 3})])
    right, wrong = scored.scores or ()
    assert (right.total, wrong.total) == (2.5, 0.5)
    assert right.terms == {"mine:compute_score": 1.0, "mine:lengths": 1.0}
    assert right.extras == {"mine:compute_score/acc": 1.0, "mine:compute_score/row": 3.0}
    assert wrong.extras == {"mine:compute_score/acc": 0.0, "mine:compute_score/row": 3.0}


def config(name: str, **kwargs: object) -> RewardConfig:
    return RewardConfig(terms=[RewardTerm(name="format"), RewardTerm(name=name, kwargs=dict(kwargs))])


def test_rewards_are_checked_before_a_run_starts(file: Path, tmp_path: Path) -> None:
    check_rewards(RewardConfig())
    check_rewards(config(f"{file}:ours", bonus=1.0))
    with pytest.raises(ValueError, match="style='x'"):
        check_rewards(config(f"{file}:ours", style="x"))
    with pytest.raises(ValueError, match="max_tokens"):
        check_rewards(config("soft_overlong"))
    (tmp_path / "bad.py").write_text("raise SystemExit(7)\n")
    with pytest.raises(ValueError, match=r"bad.py:f: a reward worker ended with code 7 while starting"):
        check_rewards(config(f"{tmp_path}/bad.py:f"))


def test_the_check_loads_users_code_elsewhere(file: Path) -> None:
    code = f"""
import sys
from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.rewards.check import check_rewards
check_rewards(RewardConfig(terms=[RewardTerm(name={str(file) + ":ours"!r})]))
sys.exit(any(name in sys.modules for name in ("beside", "math_verify", "sympy", "torch")))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
