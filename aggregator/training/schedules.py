"""Stepsizes over a run: the weight of the proposals at each step; the current value has the rest."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from aggregator.errors import ConfigError
from aggregator.text import show_call

Schedule = Callable[[int, int], float]
"""(step from 0, number of steps) -> stepsize in [0, 1]."""


def constant(value: float) -> Schedule:
    """Give every step the same stepsize.

    >>> constant(0.5)(3, 10)
    0.5
    """
    checked = check_stepsize(value)
    return lambda _step, _total: checked


def linear(start: float, end: float = 0.0) -> Schedule:
    """Go from `start` at the first step to `end` at the last in equal steps.

    >>> [linear(1.0, 0.0)(step, 5) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    first, last = check_stepsize(start), check_stepsize(end)

    def schedule(step: int, total: int) -> float:
        return _between(first, last, _progress(step, total))

    schedule.__qualname__ = show_call("linear", start, end)
    return schedule


def cosine(start: float, end: float = 0.0) -> Schedule:
    """Go from `start` to `end` along half a cosine, slowly at both ends.

    This is the schedule of SGDR (Loshchilov and Hutter, 2016) without its restarts.

    >>> [round(cosine(1.0)(step, 5), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    first, last = check_stepsize(start), check_stepsize(end)

    def schedule(step: int, total: int) -> float:
        return _between(first, last, (1 - math.cos(math.pi * _progress(step, total))) / 2)

    schedule.__qualname__ = show_call("cosine", start, end)
    return schedule


def as_schedule(stepsize: float | Callable[..., float]) -> Schedule:
    """Return the schedule for `train(stepsize=...)`: a number, or a function of (step, total) or of (step).

    Raises ConfigError for a number outside [0, 1] at once, and for a function's value at its step.

    >>> as_schedule(0.3)(0, 1), as_schedule(lambda step: 1 / (step + 1))(1, 10)
    (0.3, 0.5)
    """
    if not callable(stepsize):
        return constant(stepsize)
    one = _takes_only_the_step(stepsize)
    return lambda step, total: check_stepsize(stepsize(step) if one else stepsize(step, total), f"at step {step}")


def check_stepsize(value: Any, where: str = "") -> float:
    """Return a stepsize as a float; ConfigError unless it is a number in [0, 1]."""
    number = None if isinstance(value, bool | str) or not hasattr(value, "__float__") else float(value)
    if number is None or not 0 <= number <= 1:
        raise ConfigError(
            f"Expected a stepsize in [0, 1], or a schedule such as linear(0.8, 0.2), got {value!r} {where}".rstrip()
        )
    return number


def _between(start: float, end: float, progress: float) -> float:
    """Interpolate; both ends are exact."""
    return end if progress == 1 else start + (end - start) * progress


def _progress(step: int, total: int) -> float:
    return min(step / (total - 1), 1.0) if total > 1 else 0.0


def _takes_only_the_step(function: Callable[..., float]) -> bool:
    try:
        inspect.signature(function).bind(0, 1)
    except TypeError:
        return True
    except ValueError:  # a built-in without a signature
        return False
    return False
