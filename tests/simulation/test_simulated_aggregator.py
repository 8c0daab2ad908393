"""The simulated model as an aggregator: it weighs confidence, support and agreement."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.simulation.optimizer import Ballot, Block, aggregate, is_code, majority, merge, weighted_median

CODE = "def f(x):\n    return x"
LOWER = "def f(x):\n    return x.lower()"


def merged(current: Any, *votes: tuple[Any, float], weight: float = 0.5) -> Any:
    return merge(Ballot(current, weight, list(votes)))


def test_only_changes_are_returned() -> None:
    """A component without a proposed change, or whose merge is the current value, is left out."""
    current = Block(0.5, {"a": 1, "b": "x", "c": 2})
    assert aggregate(current, [Block(0.5, {"a": 9}), Block(0.5, {"a": 9, "b": "x"})]) == {"a": 9}


def test_rules_of_different_examples_are_joined() -> None:
    """Additions without contradictions are all kept, in one line per answer."""
    text = merged(
        "Route.\nrefund -> billing",
        ("Route.\nrefund, fee -> billing", 0.5),
        ("Route.\nrefund -> billing\nbox -> shipping", 0.5),
    )
    assert text == "Route.\nrefund, fee -> billing\nbox -> shipping"


@pytest.mark.parametrize(
    ("votes", "text"),
    [
        ([("order -> billing", 0.5), ("order -> shipping", 0.5)], "Route."),
        (
            [("order -> billing", 0.5), ("order -> shipping", 0.5), ("order -> shipping", 0.5)],
            "Route.\norder -> shipping",
        ),
        ([("order -> billing", 1.0), ("order -> shipping", 0.5)], "Route.\norder -> billing"),
    ],
)
def test_contradicting_rules(votes: list[tuple[str, float]], text: str) -> None:
    """Of two answers for one word the one with more support wins; equal ones cancel each other."""
    assert merged("Route.", *((f"Route.\n{line}", weight) for line, weight in votes)) == text


@pytest.mark.parametrize(("votes", "text"), [(1, "order -> billing"), (2, "order -> shipping")])
def test_a_current_rule_changes_only_for_more_weight(votes: int, text: str) -> None:
    """With equal support the current rule is kept."""
    assert merged("order -> billing", *[("order -> shipping", 0.5)] * votes) == text


def test_an_addition_needs_half_the_current_confidence() -> None:
    """At a small stepsize one proposal alone adds nothing; several that agree do."""
    assert merged("Route.", ("Route.\nfee -> billing", 0.1), weight=0.9) == "Route."
    agreed = [("Route.\nfee -> billing", 0.1)] * 5
    assert merged("Route.", *agreed, weight=0.9) == "Route.\nfee -> billing"


def test_lines_of_prose_are_dropped_if_most_proposals_drop_them() -> None:
    """A line that proposals with more weight drop is removed; one that a single proposal drops is kept."""
    assert merged("a\nb", ("a", 0.5)) == "a\nb"
    assert merged("a\nb", ("a", 0.5), ("a", 0.5)) == "a"


@pytest.mark.parametrize(
    ("votes", "value"),
    [([(13, 0.5)], 8), ([(13, 0.5), (13, 0.5)], 13), ([(13, 0.5), (14, 0.5), (400, 0.5)], 13), ([(400, 0.5)], 8)],
)
def test_numbers_by_weighted_median(votes: list[tuple[float, float]], value: float) -> None:
    """One outlier does not move the median; with equal support the current value is kept."""
    assert weighted_median(Ballot(8, 0.5, list(votes))) == value


@pytest.mark.parametrize(("votes", "code"), [([LOWER], CODE), ([LOWER, LOWER], LOWER), ([LOWER, "def f(x: x"], CODE)])
def test_code_by_majority(votes: list[str], code: str) -> None:
    """New code is used if one text has more weight than the current one."""
    assert majority(Ballot(CODE, 0.5, [(vote, 0.5) for vote in votes])) == code


def test_lists_item_by_item() -> None:
    """Items are added and dropped like rules, in the order of first appearance."""
    assert merged(["a", "b"], (["a", "b", "c"], 0.5), (["a", "d"], 0.5), (["a", "d"], 0.5)) == ["a", "c", "d"]


def test_flags_and_values_of_another_type() -> None:
    """A flag is decided by majority; a vote of the wrong type is left out."""
    off, on = False, (True, 0.5)
    assert merged(off, on, on) is True
    assert merged(8, ("many", 0.9), on) == 8


def test_is_code() -> None:
    """Code is recognised by its first line; English that begins with `define` is not code."""
    assert is_code("@bundle()\nasync def f(x):\n    return x")
    assert not is_code("define the terms (all)")
