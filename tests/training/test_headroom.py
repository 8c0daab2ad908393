"""Headroom: what repeated rollouts of the untrained agent show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from training_fakes import Adder, additions, exact

from aggregator import ConfigError, Module, ParameterNode
from aggregator.cassettes.lineage import current_lineage
from aggregator.training.evaluation import headroom

DATA = [(i, "right") for i in range(8)]


class Moody(Module):
    """Right on even inputs, wrong on 1 and 5, and on 3 and 7 right every other time."""

    def __init__(self) -> None:
        self.prompt = ParameterNode("Guess.")
        self.turns = {i: itertools.cycle(["right", "wrong"]) for i in (3, 7)}
        self.seen: list[str] = []

    def forward(self, x: int) -> str:
        self.seen.append(current_lineage())
        if x in self.turns:
            return next(self.turns[x])
        return "right" if x % 2 == 0 else "wrong"


class Judge:
    """A guide that declares its range."""

    min_score = 0.0
    max_score = 1.0

    def __call__(self, x: Any, output: Any, info: Any) -> float:
        return float(output == info)


def test_instances_that_are_sometimes_right_are_the_headroom() -> None:
    """The record has the score and the shares of undecided and of perfect instances, by the guide's max_score."""
    found = headroom(Moody(), Judge(), DATA)
    assert (found.score, found.undecided, found.perfect) == (0.625, 0.25, 0.5)
    assert (found.instances, found.judged, found.repeats, found.identical) == (8, 8, 4, False)
    assert str(found).startswith(
        "score 0.625 +- 0.41 over 8 instances of 4 rollouts: 25% undecided, 50% always perfect"
    )
    assert found.verdict == "Something to gain: 25% of the instances are sometimes better and sometimes worse."


def test_each_repeat_has_its_own_lineage() -> None:
    """A recording keeps the repeats apart; the first one has no part for it."""
    agent = Moody()
    headroom(agent, Judge(), DATA[:1], repeats=2)
    first, second = sorted(agent.seen)
    assert (first.endswith("/sample=0"), second.endswith("/sample=0/repeat=1")) == (True, True)
    assert first.startswith("headroom/values=")


def test_an_agent_that_is_always_right() -> None:
    """With a declared best score the record shows that nothing can be gained; the best score is never inferred."""
    assert headroom(Adder(3), exact, additions(3), max_score=1).verdict.startswith("Nothing to gain")
    assert headroom(Adder(3), exact, additions(3)).perfect is None


def test_repeats_that_are_identical_because_of_a_seed_or_a_cache() -> None:
    """Equal outputs in all repeats are reported, because their spread says nothing about the agent."""
    found = headroom(Adder(1), exact, additions(3))
    assert (found.identical, found.undecided) == (True, 0.0)
    assert "identical, because of a seed" in found.verdict


def test_instances_are_drawn_by_seed() -> None:
    """At most `sample` instances are drawn, the same ones for the same seed."""
    seen = []
    for seed in (0, 0, 1):
        agent = Moody()
        headroom(agent, Judge(), DATA, sample=2, repeats=2, seed=seed)
        seen.append(sorted(set(agent.seen)))
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0]) == 4


def test_an_agent_that_fails_gets_the_declared_minimum() -> None:
    """Without a minimum its instances are not judged, and the record says so."""

    class Fails(Moody):
        def forward(self, x: int) -> str:
            if x == 0:
                raise KeyError("lang")
            return super().forward(x)

    assert headroom(Fails(), Judge(), DATA).judged == 8
    found = headroom(Fails(), lambda x, output, info: float(output == info), DATA)
    assert (found.judged, len(found.failures)) == (7, 4)
    assert "1 not judged" in str(found)


def test_an_agent_that_sometimes_fails_is_not_always_right() -> None:
    """A crashed repeat was left out of its instance's mean, so that nothing seemed left to gain."""
    calls = itertools.count()

    def agent(x: int, *, hint: str = "") -> int:
        if next(calls) % 2:
            raise KeyError("lang")
        return x

    found = headroom(agent, lambda x, output, info: float(output == info), [(1, 1), (2, 2)], repeats=2, max_score=1)
    assert (found.score, found.undecided, found.perfect) == (0.5, 1.0, 0.0)


def test_unjudged_instances_are_not_reported_as_nothing_to_gain() -> None:
    """One of two instances is always right, the other always fails."""

    def agent(x: int, *, hint: str = "") -> int:
        return {1: 1}[x]

    found = headroom(agent, lambda x, output, info: float(output == info), [(1, 1), (2, 2)], max_score=1)
    assert found.verdict == "1 of 2 instances were not judged; look at these first."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 1}, "at least 2"),
        ({"repeats": 0}, "repeats"),
        ({"sample": 0}, "sample"),
        ({"max_score": "1"}, "max"),
    ],
)
def test_bad_arguments(options: Any, message: str) -> None:
    """Invalid arguments are refused before the first rollout."""
    with pytest.raises(ConfigError, match=message):
        headroom(Moody(), Judge(), DATA, **options)
