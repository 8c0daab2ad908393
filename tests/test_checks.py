"""Checks of arguments: a bool is not a number, and each error names the argument."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from aggregator import ConfigError
from aggregator.checks import check_count, check_finite, check_positive, is_async, is_finite, is_int


class Asks:
    async def __call__(self) -> None: ...


class Plain:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "whole", "finite"),
    [
        (0, True, True),
        (-3, True, True),
        (2.5, False, True),
        (True, False, False),
        (float("nan"), False, False),
        (float("-inf"), False, False),
        (10**400, True, False),
        ("1", False, False),
        (None, False, False),
        (1j, False, False),
    ],
)
def test_what_counts_as_a_number(value: Any, whole: bool, finite: bool) -> None:
    """An int is whole, a float that is not NaN or infinite is finite, and a bool is neither."""
    assert (is_int(value), is_finite(value)) == (whole, finite)


def test_what_counts_as_asynchronous() -> None:
    """Functions, methods, partial functions and callable objects."""

    async def ask() -> None: ...

    given = (ask, functools.partial(ask), functools.partial(Asks()), Asks(), Asks().__call__, print, Plain(), Asks, 3)
    found = [is_async(f) for f in given]
    assert found == [True] * 5 + [False] * 4


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_positive("size", 0), "Expected size to be an int of at least 1, got 0"),
        (lambda: check_positive("size", bool(1)), "Expected size to be an int of at least 1, got True"),
        (
            lambda: check_count("n", 1.0, meaning="0 is off"),
            "Expected n to be an int of at least 0 (0 is off), got 1.0",
        ),
        (lambda: check_finite("score", float("nan")), "Expected score to be a finite number, got nan"),
        (lambda: check_finite("c", -1, least=0), "Expected c to be a finite number of at least 0, got -1"),
    ],
)
def test_the_error_names_the_argument(check: Any, message: str) -> None:
    """It has what was expected, what it got, and the argument."""
    with pytest.raises(ConfigError) as raised:
        check()
    assert str(raised.value) == message


def test_valid_values_pass() -> None:
    """The minimum itself is allowed."""
    check_positive("size", 1)
    check_count("n", 0)
    check_finite("c", 0, least=0)
