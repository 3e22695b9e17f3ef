"""Reward terms by name: built in, or a user's as ``package.module:function`` or ``path/to/file.py:function``.

A built-in term is a class whose fields are the term's kwargs and whose instances are called with (prompt,
response_text), and with ``response_tokens`` where they ask for it. Its ``at_once``, where it has one, is called so too,
but outside the workers: it gives the value if that takes no longer than reading the text, else None. To add one of your
own, write it in one of the forms of ``forms.py`` and name it in ``reward.terms``; nothing has to be registered.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_mmrl.rewards.accuracy import Accuracy, Boxed
from megatron_mmrl.rewards.benchmark import Benchmark
from megatron_mmrl.rewards.format import Format
from megatron_mmrl.rewards.forms import Term, adapt
from megatron_mmrl.rewards.lengths import Length, Repetition, SoftOverlong
from megatron_mmrl.rewards.plugins import check_plugin_file, is_plugin_name, load_plugin
from megatron_mmrl.types import Prompt, Response

Shortcut = Callable[[Prompt, Response], float | None]
"""A term's value where it takes no longer than reading the text, else None."""

REWARDS: dict[str, type[Any]] = {
    "accuracy": Accuracy,
    "format": Format,
    "boxed": Boxed,
    "benchmark": Benchmark,
    "repetition": Repetition,
    "soft_overlong": SoftOverlong,
    "length": Length,
}


def check_reward_name(name: str) -> None:
    """Refuse a name that is neither built in nor that of a plugin, or a file that is not there; imports nothing.

    Raises:
        ValueError: names the nearest known name.
    """
    if name in REWARDS:
        return
    if is_plugin_name(name):
        check_plugin_file(name)
        return
    near = difflib.get_close_matches(name, REWARDS, n=1)
    known = f"known: {', '.join(REWARDS)}, package.module:function or path/to/file.py:function"
    raise ValueError(f"reward {name!r} is not known; {f'did you mean {near[0]}?' if near else known}")


def build_term(name: str, kwargs: Mapping[str, object]) -> Term:
    """The term that ``name`` stands for, with ``kwargs`` bound to it.

    Raises:
        ValueError: unknown name, a module or function that is not there, or kwargs that it does not take.
    """
    check_reward_name(name)
    return adapt(name, _built_in(name, kwargs), {}) if name in REWARDS else adapt(name, load_plugin(name), kwargs)


def build_shortcut(name: str, kwargs: Mapping[str, object]) -> Shortcut | None:
    """What may give the term's value without a worker; None for terms that always need one.

    Raises:
        ValueError: kwargs that it does not take.
    """
    if not hasattr(REWARDS.get(name), "at_once"):
        return None
    at_once = _built_in(name, kwargs).at_once
    if not reads_tokens(name):
        return lambda prompt, response: at_once(prompt, response.text)
    return lambda prompt, response: at_once(prompt, response.text, response_tokens=len(response.ids))


def build_gold_check(name: str, kwargs: Mapping[str, object]) -> Callable[[Prompt], bool] | None:
    """Whether a prompt's gold answer is one that the term can compare with; None for terms that take any."""
    return _built_in(name, kwargs).accepts if reads_gold(name) else None


def reads_gold(name: str) -> bool:
    """Whether some gold answers are of no use to the term."""
    return hasattr(REWARDS.get(name), "accepts")


def reads_tokens(name: str) -> bool:
    """Whether the term's value may depend on more of the response than its text."""
    return name not in REWARDS or "response_tokens" in inspect.signature(REWARDS[name].__call__).parameters


def reads_meta(name: str) -> Sequence[str] | None:
    """Keys of ``Prompt.meta`` on which the term's value may depend; None: on any part of the prompt."""
    return getattr(REWARDS[name], "reads_meta", ()) if name in REWARDS else None


def _built_in(name: str, kwargs: Mapping[str, object]) -> Any:
    try:
        return REWARDS[name](**kwargs)
    except (TypeError, ValueError) as error:
        known = ", ".join(inspect.signature(REWARDS[name]).parameters)
        raise ValueError(f"reward {name} does not take the kwargs {dict(kwargs)}: {error}; it has {known}") from error
