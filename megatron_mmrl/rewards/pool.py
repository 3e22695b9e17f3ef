"""Scores responses in processes that are killed when one takes too long.

``submit`` hands a group over and returns, ``score`` collects: what is submitted while other completions are still
being generated is scored by then. A verdict belongs to a question and a text, not to a call, so it does not matter who
submits what, in which order, or how often. What every term can tell as fast as the text is read needs no process.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from megatron_mmrl.config.reward import RewardConfig
from megatron_mmrl.rewards.compose import compose, zero_score
from megatron_mmrl.rewards.dispatch import Dispatcher
from megatron_mmrl.rewards.process import Reply, WorkerSpec
from megatron_mmrl.rewards.registry import build_shortcut, check_reward_name, reads_gold, reads_meta, reads_tokens
from megatron_mmrl.rewards.remote import Endpoint
from megatron_mmrl.types import Group, Prompt, Response, Score

_CACHE_SIZE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """A score, and whether the same question would come to the same: else it is forgotten once it was collected."""

    score: Score
    late: bool = False
    lasting: bool = True


class RewardPool:
    """``reward.num_workers`` processes, ready to score when the constructor returns. May be used by any thread.

    The kernel kills the workers when this process ends, however it ends; ``close`` ends them before that. Workers at
    ``remote`` endpoints, one for each, come to the same verdicts; losing one costs time only.

    Raises:
        ValueError: a term of ``config`` is unknown, cannot be imported or does not take its kwargs.
        RuntimeError: a worker did not start.
    """

    def __init__(self, config: RewardConfig, remote: Sequence[Endpoint] = ()) -> None:
        for term in config.terms:
            check_reward_name(term.name)
        self._config = config
        self._weights = {term.key: term.weight for term in config.terms}
        self._shortcuts = {term.key: build_shortcut(term.name, term.kwargs) for term in config.terms}
        read = [reads_meta(term.name) for term in config.terms]
        self._all_of_prompt_matters = None in read
        self._meta_keys = sorted({key for keys in read for key in keys or ()})
        self._length_matters = any(reads_tokens(term.name) for term in config.terms)
        self._some_golds_are_useless = any(reads_gold(term.name) for term in config.terms)
        self._lock = threading.Lock()  # of the three below
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._asked: dict[bytes, Future[Reply]] = {}
        self._late_once: set[bytes] = set()
        self._timeouts = self._errors = 0
        self._dispatcher = Dispatcher(
            worker_spec(config), config.num_workers, [endpoint.connect for endpoint in remote]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, group: Group) -> None:
        """Have the group's responses scored some time; returns at once.

        Raises:
            RuntimeError: the pool is closed.
        """
        self._submit(group)

    def has(self, group: Group) -> bool:
        """Whether every response of the group was submitted here, and what came of it is at hand or on its way."""
        with self._lock:
            return all(key in self._verdicts or key in self._asked for key in self._keys(group))

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, in order, with a Score for each response.

        Equal responses to equal questions are scored once, also over calls: rewards are pure functions. A response
        whose scoring passes ``timeout_s``, raises, ends the worker or gives something other than a finite number has
        every term 0 and ``Score.error``; so has one longer than ``max_response_chars``, which no reward gets to see.
        """
        keys = [self._submit(group) for group in groups]
        self._collect([key for group_keys in keys for key in group_keys])
        scored = [
            group.with_scores(tuple(self._look_up(*pair) for pair in zip(group.responses, group_keys, strict=True)))
            for group, group_keys in zip(groups, keys, strict=True)
        ]
        self._forget({key for group_keys in keys for key in group_keys})
        return scored

    def check_golds(self, answers: Sequence[str]) -> list[bool]:
        """``check_prompts`` for questions of which only the gold answers are known."""
        return self.check_prompts(
            [Prompt(id="", source="", messages=(), images=(), answer=answer) for answer in answers]
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Whether each gold answer is one that every term can compare with; true of all where no term looks at it.

        One that takes longer than ``timeout_s`` to parse is not, nor one longer than ``max_response_chars``.
        """
        if not self._some_golds_are_useless:
            return [True] * len(prompts)
        keys = [self._gold_key(prompt) for prompt in prompts]
        distinct = {
            key: {"prompt": _without_images(prompt)}
            for key, prompt in zip(keys, prompts, strict=True)
            if len(prompt.answer) <= self._config.max_response_chars
        }
        futures = self._dispatcher.submit(list(distinct.values()))
        good = {key for key, future in zip(distinct, futures, strict=True) if future.result().value is True}
        return [key in good for key in keys]

    def counters(self) -> dict[str, float]:
        """``reward/timeouts`` and ``reward/errors``: responses that scored 0 for it since the last call."""
        counts = {"reward/timeouts": float(self._timeouts), "reward/errors": float(self._errors)}
        self._timeouts = self._errors = 0
        return counts

    @property
    def worker_pids(self) -> list[int]:
        return self._dispatcher.pids

    def close(self) -> None:
        """End the workers; safe to call twice."""
        self._dispatcher.close()

    def _submit(self, group: Group) -> list[bytes]:
        """What can be told at once becomes a verdict, the rest is asked of the workers; the keys of all."""
        prompt, keys, limit = group.prompt.prompt, self._keys(group), self._config.max_response_chars
        questions: dict[bytes, dict[str, object]] = {}
        with self._lock:
            for key, response in zip(keys, group.responses, strict=True):
                if len(response.text) > limit or key in self._verdicts or key in self._asked:
                    continue
                terms = self._at_once(prompt, response)
                if terms is None:
                    questions[key] = _question(prompt, response)
                else:
                    self._verdicts[key] = _Verdict(score=compose(terms, self._weights))
            self._asked |= zip(questions, self._dispatcher.submit(list(questions.values())), strict=True)
        return keys

    def _at_once(self, prompt: Prompt, response: Response) -> dict[str, float] | None:
        """All terms' values where none of them needs a worker."""
        terms = {}
        for key, shortcut in self._shortcuts.items():
            value = None if shortcut is None else shortcut(prompt, response)
            if value is None:
                return None
            terms[key] = value
        return terms

    def _collect(self, keys: Sequence[bytes]) -> None:
        """Wait for what was asked of ``keys`` and keep it as verdicts.

        The last one is waited for first: the others are done by then, and this thread is woken up once.
        """
        with self._lock:
            asked = {key: self._asked[key] for key in reversed(keys) if key in self._asked}
        replies = {key: future.result() for key, future in asked.items()}
        with self._lock:
            for key, reply in replies.items():
                self._verdicts[key] = self._verdict(reply, again=key in self._late_once)
                self._asked.pop(key, None)
            self._late_once |= {key for key, reply in replies.items() if reply.timed_out}

    def _forget(self, used: set[bytes]) -> None:
        """Verdicts that may come out otherwise next time, and the oldest of too many."""
        with self._lock:
            for key in used & self._verdicts.keys():
                self._verdicts.move_to_end(key)
                if not self._verdicts[key].lasting:
                    del self._verdicts[key]
            while len(self._verdicts) > max(_CACHE_SIZE, len(used)):
                self._verdicts.popitem(last=False)
            done = [key for key, future in self._asked.items() if future.done()]
            for key in done[: max(0, len(self._asked) - _CACHE_SIZE)]:  # submitted and never collected
                del self._asked[key]

    def _look_up(self, response: Response, key: bytes) -> Score:
        limit = self._config.max_response_chars
        if len(response.text) > limit:
            self._errors += 1
            reason = f"response of {len(response.text)} characters is longer than reward.max_response_chars={limit}"
            return zero_score(self._weights, reason)
        verdict = self._verdicts[key]
        self._timeouts += verdict.late
        self._errors += verdict.score.error is not None and not verdict.late
        return verdict.score

    def _verdict(self, reply: Reply, *, again: bool) -> _Verdict:
        """A hang that computed all the time is remembered; one that hardly ran (a busy machine) when late again."""
        if reply.error is None and isinstance(reply.value, dict):
            return _Verdict(score=compose(reply.value, self._weights, reply.extras))
        score = zero_score(self._weights, reply.error or f"unexpected reply {reply.value!r}")
        return _Verdict(score=score, late=reply.timed_out, lasting=reply.was_busy or (again and reply.timed_out))

    def _keys(self, group: Group) -> list[bytes]:
        """Built-in terms read the gold answer and little else; a user's may read all of the prompt."""
        prompt = group.prompt.prompt
        question = prompt.id if self._all_of_prompt_matters else self._gold_key(prompt)
        texts = []
        for response in group.responses:
            length = f"{len(response.ids)} {response.finish}" if self._length_matters else ""
            texts.append(f"{len(question)}:{question}{length}:{response.text}")
        return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]

    def _gold_key(self, prompt: Prompt) -> str:
        return json.dumps([prompt.answer, *(prompt.meta.get(key) for key in self._meta_keys)], default=str)


def worker_spec(config: RewardConfig) -> WorkerSpec:
    """What the configuration asks of every worker."""
    return WorkerSpec(
        terms=[(term.key, term.name, dict(term.kwargs)) for term in config.terms],
        timeout_s=config.timeout_s,
        max_memory_bytes=config.max_memory_bytes,
    )


def _question(prompt: Prompt, response: Response) -> dict[str, object]:
    return {
        "prompt": _without_images(prompt),
        "text": response.text,
        "tokens": len(response.ids),
        "finish": response.finish,
    }


def _without_images(prompt: Prompt) -> dict[str, object]:
    return {
        "id": prompt.id,
        "source": prompt.source,
        "messages": [(message.role, message.text) for message in prompt.messages],
        "answer": prompt.answer,
        "meta": dict(prompt.meta),
    }
