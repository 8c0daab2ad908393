"""Rankings computed from the scores of candidates."""

from __future__ import annotations

from math import inf, log, sqrt
from random import Random
from typing import Any

import msgspec
import pytest

from aggregator.records import Candidate
from aggregator.training.searches import (
    compare_on_shared,
    contributors,
    draw,
    gain,
    mean_score,
    plain,
    upper_bound,
    wins_of,
    with_scores,
)


def candidate(id_: str, *scores: float | None, **options: Any) -> Candidate:
    """Build a candidate with one score for each of the instances 0, 1, 2, ...; None means not tried."""
    return with_scores(Candidate(id=id_, values={"k": id_}, **options), enumerate(scores))


def test_each_instance_counts_once() -> None:
    """The score is the mean over instances of their own means; a lost instance does not count."""
    tried = with_scores(candidate("a", 1.0, 0.0), [(0, 0.5), (1, None), (0, 0.0)])
    assert tried.scores == {"0": (1.5, 3), "1": (0.0, 1)}
    assert tried.score == 0.25
    assert tried.trials == 4
    assert (candidate("b", None).score, mean_score(candidate("b"))) == (None, -inf)


def test_upper_bounds_favour_candidates_with_few_trials() -> None:
    """UCB1: of two candidates with one mean, that with fewer trials ranks higher, more so for a larger constant."""
    little, much = candidate("a", 0.5), candidate("b", *[0.5] * 9)
    assert upper_bound(little, 10, 1.0) == 0.5 + sqrt(log(10))
    assert upper_bound(much, 10, 1.0) == 0.5 + sqrt(log(10) / 9)
    assert upper_bound(little, 10, 0.0) == upper_bound(much, 10, 0.0) == 0.5
    assert upper_bound(candidate("c"), 10, 1.0) == inf


def test_two_candidates_are_compared_on_common_instances() -> None:
    """A candidate does not win because its instances were easier."""
    before, after = candidate("a", 0.4, 0.4, 1.0), candidate("b", None, 0.5, None, 1.0)
    decision = compare_on_shared(before, after)
    assert (decision.accepted, decision.reason) == (True, "mean score 0.4 -> 0.5 on 1 instances")
    assert gain(before, after) == pytest.approx(0.1)
    assert gain(before, candidate("c")) == -inf


def test_a_candidate_that_is_best_on_some_instance_is_on_the_front() -> None:
    """A candidate that is best nowhere is off the front, and so is one that another candidate dominates."""
    front = [
        candidate("even", 1.0, 0.0, 1.0, 0.0),
        candidate("odd", 0.0, 1.0, 0.0, 1.0),
        candidate("middling", 0.6, 0.6, 0.6, 0.6),
        candidate("half", 1.0, 0.0, 0.0, 0.0),
    ]
    assert {name: sorted(keys) for name, keys in wins_of(front).items()} == {
        "even": ["0", "2"],
        "odd": ["1", "3"],
        "middling": [],
        "half": [],
    }


def test_an_instance_that_only_one_candidate_was_tried_on_does_not_count() -> None:
    """Otherwise the first candidate would be best on every instance that the others have not seen."""
    assert [sorted(keys) for keys in wins_of([candidate("a", 0.1, 0.1), candidate("b", None, 0.9)]).values()] == [
        [],
        ["1"],
    ]


def test_candidates_are_drawn_by_weight_and_only_once() -> None:
    """Weight 0 is never drawn; the same seed draws the same candidates."""
    some = [candidate(name) for name in "abc"]
    assert [c.id for c in draw(some, [0, 5, 0], 3, Random(0))] == ["b"]
    assert sorted(c.id for c in draw(some, [1, 1, 1], 3, Random(0))) == ["a", "b", "c"]
    first = [draw(some, [1, 98, 1], 1, Random(i))[0].id for i in range(100)]
    assert first.count("b") > 90
    assert first == [draw(some, [1, 98, 1], 1, Random(i))[0].id for i in range(100)]


def test_contributors_are_collected_along_the_ancestry() -> None:
    """They lead from the current candidate to its successor, as far as the memory holds the ancestors."""
    family = [
        candidate("0.0", sample_ids=(9,)),
        candidate("0.1", parent="0.0", sample_ids=(3, 1)),
        candidate("1.1", parent="0.1", sample_ids=(1, 2)),
    ]
    assert contributors(family[2], family[0], family) == (1, 2, 3)
    assert contributors(family[2], family[1], family) == (1, 2)
    assert contributors(family[2], family[0], [family[2]]) == (1, 2)


def test_plain_values_are_what_json_returns() -> None:
    """A candidate restored from a checkpoint therefore equals the original."""

    class Limits(msgspec.Struct):
        high: int
        low: int

    values = {"limits": Limits(3, 1), "words": {"b", "a"}, "pair": (1, 2)}
    assert plain(values) == {"limits": {"high": 3, "low": 1}, "words": ["a", "b"], "pair": [1, 2]}
    assert plain(msgspec.json.decode(msgspec.json.encode(plain(values)))) == plain(values)
