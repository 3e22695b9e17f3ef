"""Scores responses in processes that are killed when one takes too long.

Create the pool in a thread that lives as long as it does, for instance the main one: Linux ends a worker when the
thread that started it ends (a worker lost that way is replaced at the next call).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from megatron_mmrl.config.reward import RewardConfig
from megatron_mmrl.rewards.compose import compose, zero_score
from megatron_mmrl.rewards.dispatch import Dispatcher
from megatron_mmrl.rewards.process import Reply
from megatron_mmrl.rewards.registry import GOLD_IS_PARSED, REWARDS, check_reward_name
from megatron_mmrl.types import Group, Prompt, Response, Score

_CACHE_SIZE = 1 << 16


class RewardPool:
    """``reward.num_workers`` processes, ready to score when the constructor returns.

    The kernel kills the workers when this process ends, however it ends; ``close`` ends them before that.

    Raises:
        ValueError: a term of ``config`` is unknown, cannot be imported or does not take its kwargs.
        RuntimeError: a worker did not start.
    """

    def __init__(self, config: RewardConfig) -> None:
        for term in config.terms:
            check_reward_name(term.name)
        self._config = config
        self._weights = {term.name: term.weight for term in config.terms}
        self._only_answer_matters = all(name in REWARDS for name in self._weights)
        self._cache: OrderedDict[bytes, Score] = OrderedDict()
        self._timeouts = self._errors = 0
        terms = [(term.name, dict(term.kwargs)) for term in config.terms]
        self._dispatcher = Dispatcher(terms, config.timeout_s, config.num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, in order, with a Score for each response.

        Equal responses to equal questions are scored once, also over calls: rewards are pure functions. A response
        whose scoring passes ``timeout_s``, raises, ends the worker or gives something other than a finite number has
        every term 0 and ``Score.error``; so has one longer than ``max_response_chars``, which no reward gets to see.
        """
        keys = [[self._key(group.prompt.prompt, response) for response in group.responses] for group in groups]
        questions: dict[bytes, dict[str, object]] = {}
        scores: dict[bytes, Score] = {}
        for group, group_keys in zip(groups, keys, strict=True):
            for response, key in zip(group.responses, group_keys, strict=True):
                if len(response.text) > self._config.max_response_chars:
                    scores[key] = zero_score(self._weights, self._too_long(response.text))
                elif key in self._cache:
                    self._cache.move_to_end(key)
                    scores[key] = self._cache[key]
                elif key not in questions:
                    questions[key] = {"prompt": _without_images(group.prompt.prompt), "text": response.text}
        replies = dict(zip(questions, self._dispatcher.run(list(questions.values())), strict=True))
        scores |= {key: self._score(reply) for key, reply in replies.items()}
        self._remember({key: scores[key] for key in replies})
        self._count([key for group_keys in keys for key in group_keys], scores, replies)
        return [
            group.with_scores(tuple(scores[key] for key in group_keys))
            for group, group_keys in zip(groups, keys, strict=True)
        ]

    def check_golds(self, answers: Sequence[str]) -> list[bool]:
        """Whether each gold answer can be compared with; true of all where no term parses it.

        One that takes longer than ``timeout_s`` to parse cannot, nor one longer than ``max_response_chars``.
        """
        if GOLD_IS_PARSED.isdisjoint(self._weights):
            return [True] * len(answers)
        distinct = [a for a in dict.fromkeys(answers) if len(a) <= self._config.max_response_chars]
        replies = self._dispatcher.run([{"gold": answer} for answer in distinct])
        good = {answer for answer, reply in zip(distinct, replies, strict=True) if reply.value is True}
        return [answer in good for answer in answers]

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

    def _key(self, prompt: Prompt, response: Response) -> bytes:
        """Built-in terms read the gold answer only; a user's may read all of the prompt."""
        question = prompt.answer if self._only_answer_matters else prompt.id
        text = f"{len(question)}:{question}{response.text}"
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def _score(self, reply: Reply) -> Score:
        if reply.error is not None or not isinstance(reply.value, dict):
            return zero_score(self._weights, reply.error or f"unexpected reply {reply.value!r}")
        return compose(reply.value, self._weights)

    def _remember(self, scores: dict[bytes, Score]) -> None:
        """Only what went well: a time limit may have been passed because the machine was busy."""
        self._cache |= {key: score for key, score in scores.items() if score.error is None}
        while len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)

    def _count(self, keys: Sequence[bytes], scores: dict[bytes, Score], replies: dict[bytes, Reply]) -> None:
        late = sum(key in replies and replies[key].timed_out for key in keys)
        self._timeouts += late
        self._errors += sum(scores[key].error is not None for key in keys) - late

    def _too_long(self, text: str) -> str:
        limit = self._config.max_response_chars
        return f"response of {len(text)} characters is longer than reward.max_response_chars={limit}"


def _without_images(prompt: Prompt) -> dict[str, object]:
    return {
        "id": prompt.id,
        "source": prompt.source,
        "messages": [(message.role, message.text) for message in prompt.messages],
        "answer": prompt.answer,
        "meta": dict(prompt.meta),
    }
