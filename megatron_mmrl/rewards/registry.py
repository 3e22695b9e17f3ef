"""Reward terms by name: built in, or a user's function as ``package.module:function``.

A term is a pure function ``(prompt: Prompt, response_text: str, **kwargs) -> float``. To add one, write it and name
it in ``reward.terms``; nothing has to be registered. The prompt it is given carries no images.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from megatron_mmrl.rewards.accuracy import accuracy
from megatron_mmrl.rewards.format import think_answer_format
from megatron_mmrl.types import Prompt

RewardFn = Callable[[Prompt, str], float]

REWARDS: dict[str, Callable[..., float]] = {"accuracy": accuracy, "format": think_answer_format}
GOLD_IS_PARSED = frozenset({"accuracy"})  # terms that mean nothing where the gold answer cannot be parsed


def check_reward_name(name: str) -> None:
    """Refuse a name that is neither built in nor of the form ``module:function``, without importing anything.

    Raises:
        ValueError: names the nearest known name.
    """
    if name in REWARDS or _is_plugin(name):
        return
    near = difflib.get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REWARDS)}, or package.module:function"
    raise ValueError(f"reward {name!r} is not known; {hint}")


def build_reward(name: str, kwargs: Mapping[str, object]) -> RewardFn:
    """The function that ``name`` stands for, with ``kwargs`` bound to it.

    Raises:
        ValueError: unknown name, a module or function that is not there, or kwargs that the function does not take.
    """
    check_reward_name(name)
    function = REWARDS[name] if name in REWARDS else _load_plugin(name)
    try:
        inspect.signature(function).bind("prompt", "response_text", **kwargs)
    except TypeError as error:
        raise ValueError(
            f"reward {name} cannot be called as (prompt, response_text, **{dict(kwargs)}): {error}"
        ) from error
    return partial(function, **kwargs)


def _is_plugin(name: str) -> bool:
    module, separator, function = name.partition(":")
    return bool(separator) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _load_plugin(name: str) -> Callable[..., float]:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"reward {name}: cannot import {module_name} ({error}); is it right and on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"reward {name}: {module_name} ({module.__file__}) has no function {function_name}")
    return cast("Callable[..., float]", function)
