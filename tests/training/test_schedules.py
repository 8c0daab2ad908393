"""Stepsizes over a run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.errors import ConfigError
from aggregator.training.schedules import as_schedule, check_stepsize, constant, cosine, linear

STEPSIZES = st.floats(0, 1)
RUNS = st.integers(1, 1000).flatmap(lambda total: st.tuples(st.integers(0, total - 1), st.just(total)))


def values(schedule: Any, total: int) -> list[float]:
    return [round(schedule(step, total), 6) for step in range(total)]


def test_shapes() -> None:
    """The values of each schedule over five steps."""
    assert values(constant(0.3), 5) == [0.3] * 5
    assert values(linear(0.8, 0.4), 5) == [0.8, 0.7, 0.6, 0.5, 0.4]
    assert values(cosine(1.0, 0.0), 5) == [1.0, 0.853553, 0.5, 0.146447, 0.0]
    assert values(linear(0.0, 1.0), 3) == [0.0, 0.5, 1.0]


@given(start=STEPSIZES, end=STEPSIZES, run=RUNS)
def test_schedules_stay_between_their_ends(start: float, end: float, run: tuple[int, int]) -> None:
    """Every value is between start and end; the first step has start, the last of several has end."""
    step, total = run
    for make in (linear, cosine):
        schedule = make(start, end)
        assert min(start, end) - 1e-12 <= schedule(step, total) <= max(start, end) + 1e-12
        assert schedule(0, total) == start
        assert total == 1 or schedule(total - 1, total) == end


def test_numbers_and_functions_become_schedules() -> None:
    """`train(stepsize=...)` accepts a number, a schedule, a function of the step, and the ints 0 and 1."""
    assert as_schedule(0.5)(3, 10) == 0.5
    assert as_schedule(1)(3, 10) == 1.0
    assert as_schedule(linear(1, 0))(9, 10) == 0.0
    assert as_schedule(lambda step: 1 / (1 + step))(3, 10) == 0.25
    assert as_schedule(lambda step, total: step / total)(3, 10) == 0.3


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), "0.5", None, True, [0.5]])
def test_stepsize_outside_zero_and_one(wrong: Any) -> None:
    """A value that is not a number in [0, 1] is refused before the run begins."""
    for make in (constant, linear, cosine, as_schedule):
        with pytest.raises(ConfigError, match=r"Expected a stepsize in \[0, 1\]"):
            make(wrong)
    with pytest.raises(ConfigError, match=r"Expected a stepsize in \[0, 1\]"):
        linear(0.5, wrong)


def test_function_that_leaves_the_range() -> None:
    """A function's value is checked at its step, and the error names the step."""
    schedule = as_schedule(lambda step: step * 0.6)
    assert schedule(1, 3) == 0.6
    with pytest.raises(ConfigError, match=r"got 1.2 at step 2$"):
        schedule(2, 3)


def test_numpy_like_numbers() -> None:
    """A number of another library is converted to a float."""

    class Scalar:
        def __float__(self) -> float:
            return 0.25

    assert check_stepsize(Scalar()) == 0.25
