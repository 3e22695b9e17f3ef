"""A process that scores what it is sent, one JSON line per job, until its pipe closes. Started by ``process.py``.

It runs code that may never come back (math-verify on hostile expressions, users' rewards), so everything about it
is built to be killed: it holds nothing, it dies with its parent, and memory and CPU time have a ceiling.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO

from megatron_mmrl.lifetime import die_with_parent
from megatron_mmrl.rewards.accuracy import accuracy, gold_is_parsable
from megatron_mmrl.rewards.registry import GOLD_IS_PARSED, RewardFn, build_reward
from megatron_mmrl.types import Message, Prompt

MEMORY_LIMIT_BYTES = 8 << 30
CPU_GRACE_S = 10  # the parent's limit comes first; this one counts when the parent itself stands still


def main() -> int:
    """Read the specification, say ``ready``, answer jobs. Exit code 0: the parent closed the pipe."""
    die_with_parent(int(sys.argv[1]))
    requests, replies = _private_pipes()
    spec = json.loads(requests.readline())
    _set_limits()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off

    def reply(message: Mapping[str, object]) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    try:
        rewards = {name: build_reward(name, kwargs) for name, kwargs in spec["terms"]}
    except ValueError as error:
        reply({"refused": str(error)})
        return 2
    if not GOLD_IS_PARSED.isdisjoint(rewards):
        _warm_up()
    reply({"ready": True})
    for line in requests:
        job = json.loads(line)
        _limit_cpu(spec["timeout_s"])
        reply({"id": job["id"], **_answer(job, rewards)})
    return 0


def _answer(job: Mapping, rewards: Mapping[str, RewardFn]) -> dict[str, object]:
    if "gold" in job:
        return _guarded("gold", lambda: gold_is_parsable(job["gold"]))
    prompt = _prompt(job["prompt"])
    terms = {}
    for name, reward in rewards.items():
        result = _guarded(name, lambda: _number(reward(prompt, job["text"])))  # noqa: B023  # called at once
        if "error" in result:
            return result
        terms[name] = result["value"]
    return {"value": terms}


def _guarded(name: str, function: Callable[[], float]) -> dict[str, object]:
    try:
        return {"value": function()}
    except Exception as error:  # noqa: BLE001  # users' code may raise anything; the report is the handling
        return {"error": f"{name}: {type(error).__name__}: {str(error)[:500]}"}


def _number(value: object) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"a reward must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"a reward must be finite, got {value}")
    return float(value)


def _prompt(fields: Mapping) -> Prompt:
    messages = tuple(Message(role=role, text=text) for role, text in fields["messages"])
    return Prompt(images=(), **{**fields, "messages": messages})


def _warm_up() -> None:
    """Import math-verify and build its grammars now, so that the first response does not pay for it."""
    half = Prompt(id="warm-up", source="", messages=(), images=(), answer=r"\frac{1}{2}")
    if accuracy(half, "<answer>0.5</answer>") != 1.0:
        raise RuntimeError("math-verify does not find 1/2 equal to 0.5; is the pinned version installed?")


def _private_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the parent, moved out of reach of code that reads standard input or prints."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _set_limits() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_cpu(timeout_s: float) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + timeout_s) + CPU_GRACE_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
