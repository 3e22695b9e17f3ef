"""The pool against rewards that hang, raise, print, die or answer nonsense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_mmrl.config.reward import RewardConfig, RewardTerm
from megatron_mmrl.rewards.pool import RewardPool
from megatron_mmrl.types import EncodedPrompt, Group, Message, Prompt, Response, Score


@pytest.fixture(scope="module")
def odd_pool(plugin_dir: Path) -> Iterator[RewardPool]:
    terms = [RewardTerm(name="odd_rewards:behave", weight=2.0), RewardTerm(name="format")]
    with RewardPool(RewardConfig(terms=terms, timeout_s=1.0, num_workers=2, max_response_chars=60_000)) as pool:
        yield pool


@pytest.fixture(scope="module")
def math_pool() -> Iterator[RewardPool]:
    with RewardPool(RewardConfig(timeout_s=1.0)) as pool:
        yield pool


def group(texts: list[str], *, answer: str = "7", name: str = "p", meta: dict | None = None) -> Group:
    ids = np.array([1], dtype=np.int64)
    prompt = Prompt(
        id=name,
        source="s",
        messages=(Message(role="user", text="?"),),
        images=(b"png",),
        answer=answer,
        meta=meta or {"bonus": "40"},
    )
    encoded = EncodedPrompt(
        prompt=prompt,
        ids=ids,
        engine_ids=ids,
        images=(),
        pixel_values=np.zeros((0, 1176), np.float32),
        image_grid_thw=np.zeros((0, 3), np.int64),
    )
    responses = tuple(
        Response(ids=ids, logprobs=np.zeros(1, np.float32), finish="stop", policy_version=0, text=text)
        for text in texts
    )
    return Group(prompt=encoded, responses=responses)


def scores_of(pool: RewardPool, texts: list[str]) -> list[Score]:
    (scored,) = pool.score([group(texts)])
    assert scored.scores is not None
    return list(scored.scores)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or before it is read
        return False
    return state != "Z"


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.02)


def test_one_hang_costs_one_response(odd_pool: RewardPool) -> None:
    before = odd_pool.worker_pids
    odd_pool.counters()
    texts = ["a", "bb", "sleep", "ccc", "dddd", "bignum", *["e" * n for n in range(5, 30)]]
    scores = scores_of(odd_pool, texts)
    for text, score in zip(texts, scores, strict=True):
        if text in ("sleep", "bignum"):
            assert score.total == 0
            assert score.terms == {"odd_rewards:behave": 0.0, "format": 0.0}
            assert "longer than the limit of 1 s" in (score.error or "")
        else:
            assert score == Score(total=2.0 * len(text), terms={"odd_rewards:behave": float(len(text)), "format": 0.0})
    assert odd_pool.counters() == {"reward/timeouts": 2.0, "reward/errors": 0.0}
    assert odd_pool.counters() == {"reward/timeouts": 0.0, "reward/errors": 0.0}
    assert sum(is_alive(pid) for pid in before) < 2
    assert all(map(is_alive, odd_pool.worker_pids))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise", "LookupError: no luck"),
        ("exit", "ended the worker, code 3"),
        ("segfault", "ended the worker, code -11"),
        ("memory", "MemoryError"),
        ("nan", "finite"),
        ("inf", "finite"),
        ("none", "NoneType"),
        ("word", "str"),
        ("x" * 60_001, "60001 characters is longer than reward.max_response_chars=60000"),
    ],
)
def test_what_goes_wrong_scores_zero_and_says_why(odd_pool: RewardPool, text: str, reason: str) -> None:
    odd_pool.counters()
    first, bad, last = scores_of(odd_pool, ["fine", text, "<think>a</think><answer>b</answer>"])
    assert first.total == 8
    assert last.terms["format"] == 1.0
    assert bad.total == 0
    assert bad.terms == {"odd_rewards:behave": 0.0, "format": 0.0}
    assert reason in (bad.error or "")
    assert odd_pool.counters() == {"reward/timeouts": 0.0, "reward/errors": 1.0}


def test_printing_and_reading_do_not_touch_the_pipes(odd_pool: RewardPool) -> None:
    printed, read = scores_of(odd_pool, ["print", "read"])
    assert (printed.total, read.total) == (10.0, 0.0)
    assert printed.error is read.error is None


def test_workers_load_no_torch(odd_pool: RewardPool) -> None:
    assert scores_of(odd_pool, ["torch"])[0] == Score(total=0.0, terms={"odd_rewards:behave": 0.0, "format": 0.0})


def test_users_rewards_see_the_prompt_without_images(odd_pool: RewardPool) -> None:
    assert scores_of(odd_pool, ["prompt"])[0].terms["odd_rewards:behave"] == 41.0


def test_more_text_than_a_pipe_holds_behind_a_hang(odd_pool: RewardPool) -> None:
    texts = ["spin", *[f"{n:02}" + "\u00e9" * 50_000 for n in range(20)]]
    scores = scores_of(odd_pool, texts)
    assert [score.total for score in scores] == [0.0] + [100_004.0] * 20


def test_a_worker_lost_while_idle_is_replaced(odd_pool: RewardPool) -> None:
    pids = odd_pool.worker_pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(pids)
    assert [score.total for score in scores_of(odd_pool, ["idle", "pool"])] == [8.0, 8.0]
    assert scores_of(odd_pool, ["idle"])[0].error is None


def test_groups_keep_their_order(math_pool: RewardPool) -> None:
    groups = [
        group([f"<answer>{n}</answer>", "<answer>3</answer>", "no tags"], answer=str(n), name=f"p{n}") for n in range(9)
    ]
    scored = math_pool.score(groups)
    assert [g.prompt.prompt.id for g in scored] == [f"p{n}" for n in range(9)]
    for n, g in enumerate(scored):
        assert [score.terms["accuracy"] for score in g.scores or ()] == [1.0, float(n == 3), 0.0]
        assert g.responses is groups[n].responses


def test_math_verify_that_never_ends_is_killed(math_pool: RewardPool) -> None:
    math_pool.counters()
    good, evil = "<think>x</think><answer>0.5</answer>", "<think>x</think><answer>$9^{9^{9^{9}}}$</answer>"
    (scored,) = math_pool.score([group([good, evil, good], answer="1/2")])
    assert [score.total for score in scored.scores or ()] == [1.0, 0.0, 1.0]
    assert math_pool.counters()["reward/timeouts"] == 1.0


def test_what_can_be_told_at_once_needs_no_worker() -> None:
    texts = [f"<think>{n}</think><answer>{answer}</answer>" for n, answer in enumerate(["7", "14/2", "8", "7.0"])]
    with RewardPool(RewardConfig()) as pool:
        os.kill(pool.worker_pids[0], signal.SIGSTOP)  # it answers nothing any more
        assert [score.total for score in scores_of(pool, [*texts, "7", ""])] == [1.0, 1.0, 0.1, 1.0, 0.0, 0.0]
        assert pool.counters() == {"reward/timeouts": 0.0, "reward/errors": 0.0}
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(group(["<answer>7</answer>"]))


def test_no_groups(math_pool: RewardPool) -> None:
    assert math_pool.score([]) == []
    assert math_pool.score([group([])])[0].scores == ()


def test_golds_are_checked_in_the_pool(math_pool: RewardPool) -> None:
    nested = "(" * 5000 + "1" + ")" * 5000
    answers = ["7", "cat", "1/2", "", nested, "7"]
    assert math_pool.check_golds(answers) == [True, False, True, False, False, True]


def test_golds_do_not_matter_to_rewards_that_do_not_parse_them() -> None:
    with RewardPool(RewardConfig(terms=[RewardTerm(name="format")])) as pool:
        assert pool.check_golds(["cat", ""]) == [True, True]


def test_equal_responses_are_scored_once(plugin_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    terms = [RewardTerm(name="odd_rewards:counted", kwargs={"path": str(log)})]
    with RewardPool(RewardConfig(terms=terms)) as pool:
        pool.score([group(["a", "a", "b"], name="p"), group(["a"], name="q")])
        pool.score([group(["b", "a"], name="p")])
    assert sorted(log.read_text().split("\n")[:-1]) == ["p a", "p b", "q a"]


def test_failures_are_not_remembered(plugin_dir: Path, tmp_path: Path) -> None:
    terms = [RewardTerm(name="odd_rewards:once", kwargs={"path": str(tmp_path / "flag")})]
    with RewardPool(RewardConfig(terms=terms)) as pool:
        first, second = scores_of(pool, ["a"]), scores_of(pool, ["a"])
    assert first[0].error == "odd_rewards:once: UnsupportedOperation: not readable"
    assert second[0] == Score(total=1.0, terms={"odd_rewards:once": 1.0})


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "reason"),
    [
        ("acuracy", {}, ValueError, "did you mean accuracy"),
        ("odd_rewards:absent", {}, ValueError, "no function absent"),
        ("odd_rewards:behave", {"limit": 3}, ValueError, "limit"),
        ("misspelt_rewards:broken", {}, ValueError, r"cannot import misspelt_rewards.*line 1"),
        ("broken_rewards:broken", {}, RuntimeError, "ended with code 1 while starting"),
    ],
)
def test_bad_terms_are_refused_at_the_start(
    plugin_dir: Path, name: str, kwargs: dict, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        RewardPool(RewardConfig(terms=[RewardTerm(name=name, kwargs=kwargs)]))


class Alarm(Exception):
    pass


def test_an_interrupt_leaves_a_pool_that_can_be_used_and_closed(plugin_dir: Path) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise Alarm

    pool = RewardPool(RewardConfig(terms=[RewardTerm(name="odd_rewards:behave")], timeout_s=1))
    pids = pool.worker_pids
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Alarm):
            pool.score([group(["sleep"])])
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert scores_of(pool, ["a"])[0].total == 1.0
    pids += pool.worker_pids
    pool.close()
    wait_until_gone(pids)
    with pytest.raises(RuntimeError, match="closed"):
        pool.score([group(["a"])])
    pool.close()


def test_no_worker_outlives_a_killed_parent(plugin_dir: Path) -> None:
    """Killed while a worker is in the middle of one endless C call, which no thread or signal handler interrupts."""
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(plugin_dir)!r}]
from test_rewards_pool import RewardConfig, RewardPool, RewardTerm, group
pool = RewardPool(RewardConfig(terms=[RewardTerm(name="odd_rewards:behave")], timeout_s=600, num_workers=2))
print(*pool.worker_pids, flush=True)
pool.score([group(["bignum"])])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(pids)
