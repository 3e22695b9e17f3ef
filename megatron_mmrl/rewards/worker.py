"""A process that scores what it is sent, one JSON line per job, until its pipe closes. Started by ``process.py``.

It runs code that may never come back (math-verify on hostile expressions, users' rewards), so everything about it
is built to be killed: it holds nothing, it dies with its parent, and memory and CPU time have a ceiling.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from megatron_mmrl.lifetime import die_with_parent
from megatron_mmrl.rewards.accuracy import is_equal
from megatron_mmrl.rewards.forms import Sample, Term
from megatron_mmrl.rewards.mathematics import hurry_latex_parser
from megatron_mmrl.rewards.registry import build_gold_check, build_term
from megatron_mmrl.types import Message, Prompt

GoldCheck = Callable[[Prompt], bool]
CPU_GRACE_S = 10  # the parent's limit comes first; this one counts when the parent itself stands still


def main() -> int:
    """Read the specification, say ``ready``, answer jobs. Exit code 0: the parent closed the pipe."""
    die_with_parent(int(sys.argv[1]))
    requests, replies = _private_pipes()
    spec = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off

    def reply(message: Mapping[str, object]) -> None:
        replies.write(json.dumps({"cpu_s": time.process_time(), **message}).encode() + b"\n")
        replies.flush()

    try:
        terms = {key: build_term(name, kwargs) for key, name, kwargs in spec["terms"]}
        checks = [check for _, name, kwargs in spec["terms"] if (check := build_gold_check(name, kwargs))]
    except ValueError as error:
        reply({"refused": str(error)})
        return 2
    if checks:
        _warm_up()
    _limit_memory(spec["max_memory_bytes"])
    reply({"ready": True})
    for line in requests:
        job = json.loads(line)
        _limit_cpu(spec["timeout_s"])
        reply({"id": job["id"], **_answer(job, terms, checks)})
    return 0


def _answer(job: Mapping, terms: Mapping[str, Term], checks: Sequence[GoldCheck]) -> dict[str, object]:
    prompt = _prompt(job["prompt"])
    if "text" not in job:
        return _guarded("gold", lambda: all(check(prompt) for check in checks))
    sample = Sample(prompt=prompt, text=job["text"], tokens=job["tokens"], finish=job["finish"])
    values: dict[str, float] = {}
    extras: dict[str, float] = {}
    for key, term in terms.items():
        result = _guarded(key, term, sample)
        if "error" in result:
            return result
        values[key], more = result["value"]
        extras |= {f"{key}/{name}": value for name, value in more.items()}
    return {"value": values, "extras": extras}


def _guarded(key: str, function: Callable[..., Any], *arguments: object) -> dict[str, Any]:
    try:
        return {"value": function(*arguments)}
    except Exception as error:  # noqa: BLE001  # users' code may raise anything; the report is the handling
        return {"error": f"{key}: {type(error).__name__}: {str(error)[:500]}"}


def _prompt(fields: Mapping) -> Prompt:
    messages = tuple(Message(role=role, text=text) for role, text in fields["messages"])
    return Prompt(images=(), **{**fields, "messages": messages})


def _warm_up() -> None:
    """Import math-verify and build its grammars now, so that the first response does not pay for it."""
    hurry_latex_parser()
    if not is_equal(r"\frac{1}{2}", "0.5"):
        raise RuntimeError("math-verify does not find 1/2 equal to 0.5; is the pinned version installed?")


def _private_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes to the parent, moved out of reach of code that reads standard input or prints."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _limit_memory(more_bytes: int) -> None:
    """Let the address space grow by so much from here on.

    The kernel refuses the allocation itself, which a look at resident memory now and then would find too late. What
    the terms have mapped already does not count: libraries such as torch map more than they ever touch.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_cpu(timeout_s: float) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + timeout_s) + CPU_GRACE_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
