"""Scored groups, or supervised targets, become the token sequences that the trainer learns from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mmrl.types import EncodedPrompt, Group, TrainSequence


def sequences_of(groups: Sequence[Group]) -> list[TrainSequence]:
    """One sequence per response, in the order of the groups: prompt, then response.

    The loss mask is true on the response tokens. Advantages are 0: what they are may depend on log-probs that only
    sequences can be given (``algorithms/estimator.py``).

    Raises:
        ValueError: a response whose ids and log-probs differ in number.
    """
    return [sequence for group in groups for sequence in _sequences_of_group(group)]


def supervised_sequences(prompts: Sequence[EncodedPrompt], targets: Sequence[NDArray[np.int64]]) -> list[TrainSequence]:
    """One sequence per prompt and target ids i64[R]: advantage 1 on the target tokens, rollout log-probs 0.

    With advantage 1 a loss of ``-advantage x log-prob`` is the cross entropy of the target.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"{len(prompts)} prompts but {len(targets)} targets; give one target per prompt")
    return [
        _sequence(prompt, target, advantage=1.0, logprobs=np.zeros(len(target), np.float32))
        for prompt, target in zip(prompts, targets, strict=True)
    ]


def _sequences_of_group(group: Group) -> list[TrainSequence]:
    name = group.prompt.prompt.id
    result = []
    for response in group.responses:
        if len(response.ids) != len(response.logprobs):
            raise ValueError(f"a response to {name} has {len(response.ids)} ids but {len(response.logprobs)} log-probs")
        result.append(_sequence(group.prompt, response.ids, advantage=0.0, logprobs=response.logprobs))
    return result


def _sequence(
    prompt: EncodedPrompt, response: NDArray[np.int64], *, advantage: float, logprobs: NDArray[np.float32]
) -> TrainSequence:
    num_prompt = len(prompt.ids)
    if num_prompt == 0:
        raise ValueError(f"prompt {prompt.prompt.id} has no tokens; nothing would predict the first response token")
    ids = np.concatenate([prompt.ids, response]).astype(np.int64)
    loss_mask = np.arange(len(ids)) >= num_prompt
    rollout_logprobs = np.zeros(len(ids), np.float32)
    rollout_logprobs[num_prompt:] = logprobs
    return TrainSequence(
        ids=ids,
        loss_mask=loss_mask,
        advantages=np.where(loss_mask, advantage, 0.0).astype(np.float32),
        rollout_logprobs=rollout_logprobs,
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
    )
