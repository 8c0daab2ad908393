"""Checks of arguments: numbers, counts and functions, and the errors for anything else."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, TypeGuard

from aggregator.errors import ConfigError


def is_int(value: Any) -> TypeGuard[int]:
    """Return True for an int; a bool is not one.

    >>> is_int(3), is_int(True), is_int(3.0)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return True for an int or float, including NaN and infinity; a bool is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Return True for an int or float that a float can hold; NaN, infinity, bools and larger ints are not.

    >>> is_finite(0.5), is_finite(True), is_finite(float("nan")), is_finite(10**400)
    (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def looks_secret(name: str, value: str) -> bool:
    """Return True if a named text may be a key, token or password, by its name or its form.

    >>> looks_secret("API_KEY", "abcdefgh"), looks_secret("X", "sk-proj-1234abcd"), looks_secret("LANG", "C.UTF-8")
    (True, True, False)
    """
    import re  # not needed to load parameters

    if len(value) < 8 or value.isdigit():
        return False
    if re.search(
        r"(?i)key|token|secret|passw|passphrase|credential|auth(?!or)|private|signature|cookie|_pat\b|pwd$", name
    ):
        return not value.startswith("/")
    return bool(
        re.match(r"(?:[spr]k-|gh[pousr]_|github_pat_|glpat-|A[KS]IA|AIza|xox[abeprs]-|hf_|gsk_|eyJ|Bearer )", value)
    )


_COROUTINE = 0x80  # inspect.CO_COROUTINE


def is_async(function: Any) -> bool:
    """Return True if calling gives a coroutine: an `async def`, or an object whose `__call__` is one.

    >>> async def ask(): ...
    >>> is_async(ask), is_async(print)
    (True, False)
    """
    if getattr(getattr(function, "__code__", None), "co_flags", 0) & _COROUTINE:  # nearly always
        return True
    from inspect import iscoroutinefunction  # slow to load, and not needed to load parameters

    while isinstance(function, partial):
        function = function.func
    method = getattr(type(function), "__call__", None)  # noqa: B004 - it is looked up on the class, as calling does
    return iscoroutinefunction(function) or iscoroutinefunction(method)


def check_count(name: str, value: Any, *, least: int = 0, meaning: str = "") -> None:
    """Raise ConfigError unless `value` is an int of at least `least`; `meaning` explains the minimum.

    >>> check_count("memory_size", -1, meaning="0 is off")
    Traceback (most recent call last):
    aggregator.errors.ConfigError: Expected memory_size to be an int of at least 0 (0 is off), got -1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        meaning = f" ({meaning})" if meaning else ""
        raise ConfigError(f"Expected {name} to be an int of at least {least}{meaning}, got {value!r}")


check_positive = partial(check_count, least=1)
"""Raise ConfigError unless `value` is an int of at least 1."""


def check_finite(name: str, value: Any, *, least: float | None = None, meaning: str = "") -> None:
    """Raise ConfigError unless `value` is a finite number, of at least `least` if that is given.

    >>> check_finite("constant", float("inf"), least=0)
    Traceback (most recent call last):
    aggregator.errors.ConfigError: Expected constant to be a finite number of at least 0, got inf
    """
    if not is_finite(value) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least:g}"
        raise ConfigError(f"Expected {name} to be a finite number{bound}{meaning}, got {value!r}")


def accepts(function: Any, *arguments: Any, **options: Any) -> bool:
    """Return True if `function` accepts such arguments. A class does not count, a C function always does.

    >>> accepts(len, []), accepts(lambda x: x), accepts(dict)
    (True, False, False)
    """
    from inspect import signature  # slow to load, and not needed to load parameters

    if isinstance(function, type) or not callable(function):
        return False
    try:
        expected = signature(function, follow_wrapped=False)
    except ValueError:  # written in C without a signature
        return True
    try:
        expected.bind(*arguments, **options)
    except TypeError:
        return False
    return True


def is_amount(value: Any) -> bool:
    """Return True for any kind of number from 0 up that is finite.

    >>> from decimal import Decimal
    >>> is_amount(0), is_amount(Decimal("0.5")), is_amount(-1), is_amount(float("nan")), is_amount("5")
    (True, True, False, False, False)
    """
    try:
        return bool(0 <= value < float("inf"))
    except (TypeError, ValueError):
        return False


def contain_stop(error: StopIteration) -> RuntimeError:
    """Return the error of a function in a thread as a coroutine raises it.

    An asyncio future does not hold a StopIteration, so that a task that awaits it would never end.

    >>> contain_stop(StopIteration())
    RuntimeError('the function raised StopIteration')
    """
    contained = RuntimeError("the function raised StopIteration")
    contained.__cause__ = error
    return contained.with_traceback(error.__traceback__)
