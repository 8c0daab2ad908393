"""Exact match."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator import exact_match
from aggregator.errors import GuideError
from aggregator.guides import ExactMatch


@pytest.mark.requirement("Trace: exact_match_metric")
@pytest.mark.parametrize(
    ("output", "info", "score"),
    [
        ("4", "4", 1.0),
        (" 4\n", "4", 1.0),
        ("4", "5", 0.0),
        ("four", "Four", 0.0),
        (4, 4, 1.0),
        ("4", 4, 0.0),
        ([1], [1], 1.0),
    ],
)
def test_scores(output: Any, info: Any, score: float) -> None:
    """Equal is 1, anything else 0; whitespace around text does not count, type and case do."""
    assert exact_match("x", output, info)[0] == score


@pytest.mark.requirement("Trace: SimpleReferenceSuggest")
def test_feedback_names_the_expected_answer() -> None:
    """The optimizer reads the given and the expected answer, shortened if they are long."""
    assert exact_match("x", "5", "4") == (0.0, "Incorrect. Expected '4', got '5'.")
    assert len(exact_match("x", "y" * 100_000, "4")[1]) < 600


def test_normalise_and_key() -> None:
    """Both sides are normalised; the expected value may be a field of `info`."""
    guide = ExactMatch(str.casefold, key="answer")
    assert guide("x", "FOUR", {"answer": "four", "source": "book"}) == (1.0, "Correct.")


def test_a_row_as_info_without_a_key_lists_the_columns() -> None:
    """With rows as info exact_match silently scored 0 everywhere."""
    row = {"ticket": "My parcel is late", "team": "shipping"}
    with pytest.raises(GuideError, match=r"got a row with the columns 'ticket', 'team'; name the column, as in ExactM"):
        exact_match(row, "shipping", row)
    assert ExactMatch(key="team")(row, "shipping", row)[0] == 1.0
    assert exact_match(row, {"team": "shipping"}, {"team": "shipping"})[0] == 1.0
