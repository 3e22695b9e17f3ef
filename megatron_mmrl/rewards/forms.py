"""The three forms in which a user's reward can be written, all turned into one.

* ours: ``(prompt, response_text, **kwargs) -> float``;
* veRL's: ``compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs) -> float`` or a dictionary;
* ms-swift's: ``(completions, **columns) -> list[float]``, a function or a class whose instances are called so.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mmrl.types import Prompt

STYLES = ("mmrl", "verl", "swift")
_VERL_TEXT = ("solution_str", "predict_str")  # siiRL says predict_str
_UNSET = inspect.Parameter.empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response and the question that it answers; the prompt carries no images."""

    prompt: Prompt
    text: str
    tokens: int  # of the response, as sampled
    finish: str  # stop, length or abort


Outcome = tuple[float, Mapping[str, float]]
"""A term's value, and further numbers that it wants logged, by name."""
Term = Callable[[Sample], Outcome]


def adapt(name: str, function: Callable[..., Any], kwargs: Mapping[str, object]) -> Term:
    """``function``, of whichever form, as a term. ``kwargs["style"]`` says which where its parameters do not.

    Raises:
        ValueError: the form cannot be told, or the function does not take the arguments of its form.
    """
    options = dict(kwargs)
    style = options.pop("style", None)
    if style is not None and style not in STYLES:
        raise ValueError(f"reward {name}: style={style!r} is not known; use one of {', '.join(STYLES)}")
    if inspect.isclass(function):
        function, options = _instance(name, function, options), {}
    style = style or _style_of(name, function)
    make = {"mmrl": _ours, "verl": _verl, "swift": _swift}[style]
    return make(name, function, options)


def outcome(value: object) -> Outcome:
    """A number, or a dictionary whose ``score`` it is and whose other numbers are logged (words in it are not).

    Raises:
        TypeError: not a number.
        ValueError: not finite, or a dictionary without ``score``.
    """
    if not isinstance(value, Mapping):
        return _number(value), {}
    if "score" not in value:
        raise ValueError(f"a reward's dictionary must have a score, got {sorted(map(str, value))}")
    numbers_only = {str(key): each for key, each in value.items() if isinstance(each, numbers.Real)}
    score = _number(value["score"])
    return score, {key: _number(each) for key, each in numbers_only.items() if key != "score"}


def _ours(name: str, function: Callable[..., Any], options: Mapping[str, object]) -> Term:
    parameters = _parameters(name, function)
    facts = {fact for fact in ("response_tokens", "finish") if fact in parameters and fact not in options}
    _check_call(name, function, ("prompt", "response_text"), {**dict.fromkeys(facts), **options}, shown=options)

    def term(sample: Sample) -> Outcome:
        known = {"response_tokens": sample.tokens, "finish": sample.finish}
        return outcome(function(sample.prompt, sample.text, **{fact: known[fact] for fact in facts}, **options))

    return term


def _verl(name: str, function: Callable[..., Any], options: Mapping[str, object]) -> Term:
    parameters = _parameters(name, function)
    text = next((each for each in _VERL_TEXT if each in parameters), _VERL_TEXT[0])
    takes_all = _takes_any(parameters)
    optional = {each for each in ("data_source", "extra_info") if each in parameters or takes_all}
    given = {*optional, text, "ground_truth"}
    _check_call(name, function, (), {**dict.fromkeys(given), **options}, shown=options)

    def term(sample: Sample) -> Outcome:
        prompt = sample.prompt
        known = {
            "data_source": prompt.source,
            text: sample.text,
            "ground_truth": prompt.answer,
            "extra_info": dict(prompt.meta),
        }
        return outcome(function(**{each: known[each] for each in given}, **options))

    return term


def _swift(name: str, function: Callable[..., Any], options: Mapping[str, object]) -> Term:
    """Called with lists of one: a time limit, and a failure, then belong to one response."""
    parameters = _parameters(name, function)
    if "completions" not in parameters:
        raise ValueError(f"reward {name}: the batch form needs a parameter completions, it has {list(parameters)}")
    takes_all = _takes_any(parameters)
    if unknown := set(options) - set(parameters) if not takes_all else set():
        raise ValueError(f"reward {name} takes no {', '.join(sorted(unknown))}; it has {list(parameters)}")
    needed = {each for each, p in parameters.items() if p.default is _UNSET and p.kind not in _VARIABLE}

    def term(sample: Sample) -> Outcome:
        columns = _columns(sample)
        if missing := needed - columns.keys() - set(options):
            raise ValueError(f"the row has no column {', '.join(sorted(missing))}, only {sorted(columns)}")
        names = [each for each in columns if (takes_all or each in parameters) and each not in options]
        values = function(**{each: [columns[each]] for each in names}, **options)
        if not isinstance(values, Sequence) or len(values) != 1:
            raise ValueError(f"a batch of 1 completion must give a list of 1 reward, got {values!r}")
        return outcome(values[0])

    return term


def _columns(sample: Sample) -> dict[str, object]:
    """What ms-swift and TRL hand on: the data set's columns, the gold answer under its usual names, the chat."""
    prompt = sample.prompt
    chat = [{"role": message.role, "content": message.text} for message in prompt.messages]
    return {
        "answer": prompt.answer,
        "solution": prompt.answer,
        "data_source": prompt.source,
        "messages": chat,
        "prompts": chat,
        "response_tokens": sample.tokens,
        "finish": sample.finish,
        **prompt.meta,
        "completions": sample.text,
    }


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _instance(name: str, cls: Callable[..., Any], options: Mapping[str, object]) -> Callable[..., Any]:
    try:
        made = cls(**options)
    except TypeError as error:
        raise ValueError(f"reward {name}: the class cannot be made with {dict(options)}: {error}") from error
    if not callable(made):
        raise ValueError(f"reward {name}: instances of the class cannot be called; give it __call__(completions, ...)")
    return made


def _style_of(name: str, function: Callable[..., Any]) -> str:
    parameters = _parameters(name, function)
    if "completions" in parameters:
        return "swift"
    if "ground_truth" in parameters and any(text in parameters for text in _VERL_TEXT):
        return "verl"
    positional = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if len(positional) >= 2 or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in positional):
        return "mmrl"
    raise ValueError(
        f"reward {name} has the parameters {list(parameters)}, which is none of (prompt, response_text, ...), "
        "compute_score(data_source, solution_str, ground_truth, extra_info) and (completions, **columns); "
        "name them so, or say which with the kwarg style"
    )


def _parameters(name: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name}: its parameters cannot be found out ({error}); write it in Python") from error


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _check_call(
    name: str,
    function: Callable[..., Any],
    positional: Sequence[str],
    keywords: Mapping[str, object],
    *,
    shown: Mapping[str, object],
) -> None:
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError as error:
        given = ", ".join([*positional, *sorted(set(keywords) - set(shown)), f"**{dict(shown)}"])
        raise ValueError(f"reward {name} cannot be called as ({given}): {error}") from error


def _number(value: object) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"a reward must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"a reward must be finite, got {value}")
    return float(value)
