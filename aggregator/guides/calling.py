"""How guides are called: any guide in, a checked score and feedback out."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal

from aggregator.checks import accepts, is_async, is_finite
from aggregator.errors import ConfigError, GuideError
from aggregator.records import Scores
from aggregator.text import shorten

Call = Callable[..., Awaitable[Any]]
"""Runs a synchronous function elsewhere, as in `await call(function, *args)`."""


async def judge(guide: Any, x: Any, output: Any, info: Any, *, call: Call | None = None) -> tuple[float | None, str]:
    """Return a guide's score and feedback from `ask_guide`."""
    found = await ask_guide(guide, x, output, info, call=call)
    return found.primary, found.feedback


async def ask_guide(guide: Any, x: Any, output: Any, info: Any, *, call: Call | None = None) -> Scores:
    """Return a guide's score, its further scores by name, and its feedback.

    A guide is any sync or async callable `guide(x, output, info)`, an object with Trace's `get_feedback(query,
    response, reference)`, or a DSPy metric. A Trace guide is called, because its call runs `forward` and that runs
    `get_feedback`: a subclass may override either. A guide returns a score, (score, feedback), Scores, or an object
    that has score and feedback as attributes; None as the score means that the output cannot be judged. A synchronous
    guide runs through `call`, unless it has `instant = True`: it only computes, and a thread would be slower than the
    guide.

    Raises GuideError for any other result and for NaN: that is a guide's failure, not a score of 0. The guide's own
    exceptions are raised unchanged.
    """
    return await call_guide(as_guide(guide), x, output, info, call=call)


async def call_guide(guide: Any, x: Any, output: Any, info: Any, *, call: Call | None = None) -> Scores:
    """Do as `ask_guide` with the result of `as_guide`, which is called once and not for each instance."""
    function = _function_of(guide)
    if call is None or getattr(guide, "instant", False) or is_async(function):
        answer = function(x, output, info)
    else:
        answer = await call(function, x, output, info)
    if type(answer) is not tuple and inspect.isawaitable(answer):
        answer = await answer
    return verdict_of(answer, guide)


def is_instant(guide: Any) -> bool:
    """Return True for a synchronous guide that only computes (`instant = True`) and calls no model."""
    return bool(getattr(guide, "instant", False)) and not is_async(_function_of(guide))


def judge_instantly(guide: Any, x: Any, output: Any, info: Any) -> Scores:
    """Return the verdict of a guide for which `is_instant` is True."""
    return verdict_of(_function_of(guide)(x, output, info), guide)


def check_guide(guide: Any) -> None:
    """Raise ConfigError for anything that cannot judge; the agent would run on every instance for nothing."""
    if not isinstance(as_guide(guide), Metric) and not accepts(_function_of(guide), None, None, None):
        arguments = f" with the arguments {inspect.signature(guide)}" if inspect.isfunction(guide) else ""
        raise ConfigError(
            "Expected a guide: a callable (x, output, info) -> score or (score, feedback), got "
            f"{shorten(guide)}{arguments}; a metric (gold, prediction) becomes one by aggregator.guides.metric"
        )
    declared_limit(guide, "min_score")
    declared_limit(guide, "max_score")


class Metric:
    """A DSPy metric as a guide: `metric(gold, prediction, trace=None, ...)`, where gold is the data set's Example.

    It returns a score, or an object with `score` and `feedback`, and `objective_scores` as further scores by name.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        forward = getattr(type(function), "forward", None)
        found = list(inspect.signature(forward or function).parameters.values())[2 + (forward is not None) :]
        positional = [one for one in found if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        self._more = [None for one in positional if one.default is inspect.Parameter.empty]

    def __repr__(self) -> str:
        return f"metric({_name(self.function)})"

    def __call__(self, x: Any, output: Any, info: Any) -> Any:
        """Return the metric's verdict on an output; `info` is the input's row."""
        gold = info
        if isinstance(info, Mapping) and "dspy" in sys.modules:  # a row with named columns
            gold = sys.modules["dspy"].Example(dict(info))
        return _verdict(self.function(gold, output, *self._more))


def metric(function: Callable[..., Any]) -> Metric:
    """Return a metric `(gold, prediction)` as a guide.

    A metric whose third argument is named `trace`, as in DSPy, does not need this.

    >>> metric(lambda gold, prediction: gold == prediction)("x", 1, 1)
    True
    """
    return Metric(function)


def as_guide(guide: Any) -> Any:
    """Return a guide in its callable form: a DSPy metric, recognised by its third argument `trace`, as a Metric."""
    inner = guide
    while isinstance(inner, partial) and not inner.args:
        inner = inner.func
    if isinstance(inner, FunctionType | MethodType):
        function, own = inspect.unwrap(inner), int(isinstance(inner, MethodType))  # `self` is an argument of a method
    else:  # a DSPy module is called with the arguments of `forward`
        function, own = getattr(type(inner), "forward", None) or getattr(type(inner), "__call__", None), 1  # noqa: B004
    code = getattr(function, "__code__", None)  # and not its signature, which would be slower than the guide
    is_metric = code is not None and code.co_varnames[own + 2 : code.co_argcount][:1] == ("trace",)
    return Metric(guide) if is_metric else guide


def _verdict(answer: Any) -> Any:
    """Return a metric's result as a guide's, awaitable if it is."""
    if inspect.isawaitable(answer):
        return _awaited(answer)
    named = getattr(answer, "objective_scores", None)
    if not named and not hasattr(answer, "score"):
        return answer
    return Scores(answer.score, dict(named or {}), str(getattr(answer, "feedback", None) or ""))


async def _awaited(answer: Awaitable[Any]) -> Any:
    return _verdict(await answer)


def declared_limit(guide: Any, name: Literal["min_score", "max_score"]) -> float | None:
    """Return the guide's lowest or highest score, if it declares one under this name; else None."""
    limit = getattr(guide, name, None)
    if limit is not None and not is_finite(limit):
        raise ConfigError(f"Expected {name} of the guide {_name(guide)} to be a finite number, got {limit!r}")
    return None if limit is None else float(limit)


def _function_of(guide: Any) -> Any:
    """Return the judging function: the guide itself, or its `get_feedback` if it cannot be called."""
    return guide if callable(guide) and hasattr(guide, "forward") else getattr(guide, "get_feedback", guide)


def verdict_of(answer: Any, guide: Any) -> Scores:
    """Check a guide's result.

    >>> verdict_of((True, "All of it."), "my guide")
    Scores(primary=1.0, named={}, feedback='All of it.')
    """
    named: Any = {}
    if isinstance(answer, Scores):
        score, named, feedback = answer.primary, answer.named, answer.feedback
        if not isinstance(named, Mapping) or not all(isinstance(name, str) and name for name in named):
            raise _unusable(guide, f"named scores {named!r}; give a dict of name to number")
    elif isinstance(answer, tuple | list):
        if len(answer) != 2:
            raise _unusable(guide, f"a {type(answer).__name__} of {len(answer)}")
        score, feedback = answer
    elif hasattr(answer, "score") and hasattr(answer, "feedback"):
        score, feedback = answer.score, answer.feedback
    elif answer is None:
        raise _unusable(guide, "None; does it end without `return`?")
    else:
        score, feedback = answer, None
    if not isinstance(feedback, str | None):
        raise _unusable(guide, f"feedback of type {type(feedback).__name__}")
    return Scores(
        None if score is None else _number(score, guide),
        {name: _number(value, guide) for name, value in named.items()} if named else {},
        feedback or "",
    )


def _number(score: Any, guide: Any) -> float:
    if isinstance(score, str | bytes) or not hasattr(score, "__float__"):
        raise _unusable(guide, f"a score of type {type(score).__name__}")
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError) as error:  # for example an array of several numbers
        raise _unusable(guide, f"a score that is no number ({error})") from None
    if not math.isfinite(number):
        raise _unusable(guide, f"the score {number}")
    return number


def _unusable(guide: Any, got: str) -> GuideError:
    return GuideError(
        f"Expected a score or (score, feedback), the score a finite number, from the guide {_name(guide)}, got {got}"
    )


def _name(guide: Any) -> str:
    return str(getattr(guide, "__qualname__", type(guide).__qualname__))
