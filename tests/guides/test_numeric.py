"""Numbers within a tolerance."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator import ConfigError
from aggregator.errors import GuideError
from aggregator.guides import NumericMatch


@pytest.mark.parametrize(
    ("output", "info", "score"),
    [
        (42, 42, 1.0),
        ("42", 42, 1.0),
        (" 42.0\n", "42", 1.0),
        ("1,234.5", 1234.5, 1.0),
        ("-1e3", -1000, 1.0),
        (42.1, 42, 0.0),
        ("about 42", 42, 0.0),
        ("", 42, 0.0),
        ("1,23", 123, 0.0),
        (None, 42, 0.0),
        (True, 1, 0.0),
        ("nan", 42, 0.0),
        (float("nan"), 42, 0.0),
        (float("inf"), 42, 0.0),
    ],
)
def test_the_whole_output_must_be_a_number(output: Any, info: Any, score: float) -> None:
    """An output counts only if all of it is one finite number."""
    assert NumericMatch()("x", output, info)[0] == score


@pytest.mark.parametrize(
    ("output", "score"),
    [("6 times 7 is 42.", 1.0), ("42 is the answer, not 6", 0.0), ("none", 0.0), ("= 41+1 = 42", 1.0)],
)
def test_the_last_number_of_a_solution(output: str, score: float) -> None:
    """With last=True the last number of the text is the answer."""
    assert NumericMatch(last=True)("x", output, 42)[0] == score


def test_tolerances() -> None:
    """Tolerances are math.isclose's, absolute or relative."""
    assert NumericMatch(abs_tol=0.5)("x", 42.4, 42)[0] == 1.0
    assert NumericMatch(rel_tol=0.01)("x", 42.4, 42)[0] == 1.0
    assert NumericMatch(rel_tol=0.001)("x", 42.4, 42) == (0.0, "Incorrect. Expected 42, got 42.4.")
    assert NumericMatch(key="answer")("x", 42, {"answer": 42})[0] == 1.0
    with pytest.raises(ConfigError, match="tolerances of at least 0"):
        NumericMatch(abs_tol=float("nan"))


@pytest.mark.parametrize("info", [None, "many", float("nan"), [1]])
def test_a_reference_that_is_not_a_number(info: Any) -> None:
    """A data set without a number to compare is the guide's failure, not the agent's."""
    with pytest.raises(GuideError, match="Expected a finite number to compare with"):
        NumericMatch()("x", 42, info)


def test_a_long_output_is_read_in_one_pass() -> None:
    """A long text of digits and commas is read, and quoted only in part."""
    score, feedback = NumericMatch(last=True)("x", "1,111" * 50_000 + " x 42", 42)
    assert (score, feedback) == (1.0, "Correct.")
    assert len(NumericMatch()("x", "y" * 100_000, 42)[1]) < 700
