"""Rules are pure, deterministic and closed under chain; their laws and what they preserve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import portal
from aggregator.errors import ConfigError
from aggregator.records import Failure, Proposal, Values
from aggregator.training.merge import best_of, chain, dedupe, identity, key_of, majority, mean, top_k, without_failed
from aggregator.training.step import Step, UpdateRule

CURRENT: Values = {"p": "old", "k": 2, "t": 0.5, "on": True}


def run(
    rule: UpdateRule, proposals: Sequence[Proposal], *, stepsize: float = 0.5, current: Values | None = None
) -> Any:
    return portal.call(rule, proposals, Step(values=CURRENT if current is None else current, stepsize=stepsize))


def proposal(i: int, /, *, score: float | None = None, **values: Any) -> Proposal:
    return Proposal(values=values, score=score, sample_ids=(i,))


@st.composite
def batches(draw: st.DrawFn) -> list[Proposal]:
    """The proposals of one minibatch, in sample order: some empty, some failed, many alike."""
    values = st.fixed_dictionaries(
        {},
        optional={
            "p": st.sampled_from(["a", "b"]),
            "k": st.integers(-3, 9) | st.sampled_from([1.0]),
            "t": st.floats(0, 1) | st.integers(0, 1),
            "on": st.booleans(),
            "new": st.sampled_from([1, True, [1]]),
        },
    )
    drawn = st.tuples(
        values, st.none() | st.floats(0, 1), st.sampled_from([None, None, None, "cut off"]), st.integers(1, 3)
    )
    return [
        Proposal(values=found, score=score, error=error, support=support, sample_ids=(i,), feedback=f"f{i % 2}")
        for i, (found, score, error, support) in enumerate(draw(st.lists(drawn, max_size=7)))
    ]


RULES: dict[str, UpdateRule] = {
    "identity": identity,
    "without_failed": without_failed,
    "dedupe": dedupe,
    "top_k": top_k(3),
    "best_of": best_of,
    "majority": majority,
    "mean": mean,
}
NAMES = st.sampled_from(sorted(RULES))
STEPSIZES = st.floats(0, 1)


def written(proposals: Sequence[Proposal]) -> list[bytes]:
    """Return a rule's result as text that distinguishes 1, 1.0 and True."""
    return [key_of(found) for found in proposals]


# --- laws of the family


@given(batch=batches(), name=NAMES, stepsize=STEPSIZES)
@settings(max_examples=40)
def test_identity_is_neutral(batch: list[Proposal], name: str, stepsize: float) -> None:
    """identity before or after a rule changes nothing; neither does chain() or a chain of one."""
    rule = RULES[name]
    alone = written(run(rule, batch, stepsize=stepsize))
    for same in (chain(identity, rule), chain(rule, identity), chain(rule), chain(chain(), rule)):
        assert written(run(same, batch, stepsize=stepsize)) == alone


@given(batch=batches(), names=st.tuples(NAMES, NAMES, NAMES), stepsize=STEPSIZES)
@settings(max_examples=40)
def test_chain_is_associative(batch: list[Proposal], names: tuple[str, str, str], stepsize: float) -> None:
    """Any grouping of a chain gives the same result."""
    a, b, c = (RULES[name] for name in names)
    flat = written(run(chain(a, b, c), batch, stepsize=stepsize))
    assert written(run(chain(chain(a, b), c), batch, stepsize=stepsize)) == flat
    assert written(run(chain(a, chain(b, c)), batch, stepsize=stepsize)) == flat


@given(batch=batches(), name=st.sampled_from(["identity", "without_failed", "dedupe", "top_k", "best_of"]))
@settings(max_examples=40)
def test_selection_is_idempotent(batch: list[Proposal], name: str) -> None:
    """Selecting or deduplicating a second time changes nothing."""
    once = run(RULES[name], batch)
    assert written(run(RULES[name], once)) == written(once)


@given(batch=batches(), name=NAMES)
@settings(max_examples=40)
def test_rules_are_pure(batch: list[Proposal], name: str) -> None:
    """A rule changes neither the proposals nor the current values, and returns the same each time."""
    current = dict(CURRENT)
    before = written(batch)
    first = run(RULES[name], batch, current=current)
    assert written(run(RULES[name], batch, current=current)) == written(first)
    assert (written(batch), current) == (before, CURRENT)


@given(batch=batches(), order=st.randoms(use_true_random=False), name=st.sampled_from(["majority", "best_of"]))
@settings(max_examples=40)
def test_merging_does_not_depend_on_order(batch: list[Proposal], order: Any, name: str) -> None:
    """Shuffled proposals merge into the same one: ties are decided by sample."""
    shuffled = list(batch)
    order.shuffle(shuffled)
    assert written(run(RULES[name], batch)) == written(run(RULES[name], shuffled))


@given(
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=7),
    order=st.randoms(use_true_random=False),
    stepsize=STEPSIZES,
)
@settings(max_examples=100)
def test_mean_does_not_depend_on_order(numbers: list[float], order: Any, stepsize: float) -> None:
    """Shuffled proposals have the same mean to the last bit: sums are exact."""
    batch = [proposal(i, t=number) for i, number in enumerate(numbers)]
    shuffled = list(batch)
    order.shuffle(shuffled)
    assert written(run(mean, batch, stepsize=stepsize)) == written(run(mean, shuffled, stepsize=stepsize))


@given(
    batch=batches(),
    order=st.randoms(use_true_random=False),
    name=st.sampled_from(["without_failed", "dedupe", "top_k"]),
)
@settings(max_examples=40)
def test_selection_does_not_depend_on_order(batch: list[Proposal], order: Any, name: str) -> None:
    """Shuffled proposals give the same selection, in the shuffled order."""
    shuffled = list(batch)
    order.shuffle(shuffled)
    assert sorted(written(run(RULES[name], batch))) == sorted(written(run(RULES[name], shuffled)))


@given(batch=batches(), name=st.sampled_from(["identity", "dedupe"]))
@settings(max_examples=40)
def test_nothing_is_dropped_silently(batch: list[Proposal], name: str) -> None:
    """Support and sample ids of all proposals are kept."""
    found = run(RULES[name], batch)
    assert sum(one.support for one in found) == sum(one.support for one in batch)
    assert sorted(i for one in found for i in one.sample_ids) == sorted(i for one in batch for i in one.sample_ids)


@pytest.mark.parametrize("name", RULES)
def test_no_proposals(name: str) -> None:
    """No proposals give no proposals."""
    assert list(run(RULES[name], [])) == []


# --- each rule


def test_chain_runs_from_left_to_right() -> None:
    """Every rule gets the stepsize and the current values; the proposals pass through in order."""
    seen: list[tuple[int, float, Values]] = []

    async def watch(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        await asyncio.sleep(0)
        seen.append((len(proposals), step.stepsize, step.values))
        return proposals[:-1]

    run(chain(watch, without_failed, watch), [proposal(i, k=i) for i in range(3)], stepsize=0.25)
    assert seen == [(3, 0.25, CURRENT), (2, 0.25, CURRENT)]


def test_without_failed() -> None:
    """A proposal with an error is dropped; one without values is not a failure."""
    kept = [proposal(0, k=1), proposal(2)]
    assert run(without_failed, [kept[0], Proposal(values={"k": 9}, error="cut off", sample_ids=(1,)), kept[1]]) == kept


def test_dedupe_counts_support() -> None:
    """Three equal proposals become one of support 3: ids in order, feedback once, mean score."""
    failure = Failure(stage="agent", error="ValueError", message="no")
    batch = [
        Proposal(values={"k": 1, "p": "a"}, score=0.2, feedback="late", reasoning="one", sample_ids=(4,)),
        Proposal(values={"k": 2}, score=None, sample_ids=(5,)),
        Proposal(values={"p": "a", "k": 1}, score=None, feedback="late", failures=(failure,), sample_ids=(6,)),
        Proposal(values={"k": 1, "p": "a"}, score=0.8, feedback="wrong", reasoning="two", sample_ids=(7,), support=2),
    ]
    merged, other = run(dedupe, batch)
    assert (merged.values, merged.support, merged.sample_ids) == ({"k": 1, "p": "a"}, 4, (4, 6, 7))
    assert (merged.score, merged.feedback, merged.reasoning) == (pytest.approx(0.6), "late\nwrong", "one\ntwo")
    assert merged.failures == (failure,)
    assert other is batch[1]


def test_dedupe_distinguishes_types() -> None:
    """1, 1.0 and True are three proposals; two empty ones are not merged either, as their meanings may differ."""
    assert len(run(dedupe, [proposal(0, k=1), proposal(1, k=1.0), proposal(2, k=True)])) == 3
    assert len(run(dedupe, [proposal(0), proposal(1)])) == 2


def test_dedupe_accepts_values_that_json_does_not_support() -> None:
    """Values of any type can be compared; sets by their elements."""
    assert len(run(dedupe, [proposal(0, k={"b", "a"}), proposal(1, k={"a", "b"}), proposal(2, k=3 + 1j)])) == 2


def test_top_k() -> None:
    """The best by score, in input order; of equal ones the earlier sample, unknown scores last."""
    batch = [proposal(i, score=score, k=i) for i, score in enumerate([0.1, None, 0.9, 0.5, 0.5])]
    assert [one.values["k"] for one in run(top_k(2), batch)] == [2, 3]
    assert [one.values["k"] for one in run(top_k(9), batch)] == [0, 1, 2, 3, 4]
    assert [one.values["k"] for one in run(best_of, batch)] == [2]
    assert [one.values["k"] for one in run(best_of, batch[:1:-1][:2])] == [3]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_top_k_needs_a_positive_int(k: Any) -> None:
    """k is an int of at least 1."""
    with pytest.raises(ConfigError, match="Expected top_k of an int of at least 1"):
        top_k(k)


@pytest.mark.requirement("Trace: OptoPrimeMulti: majority")
def test_majority_counts_instances() -> None:
    """The value with more instances wins; a proposal without the parameter does not vote on it."""
    batch = [
        Proposal(values={"p": "a"}, support=3, sample_ids=(0, 1, 2)),
        proposal(3, p="b", k=7),
        proposal(4, p="b"),
        proposal(5),
    ]
    (merged,) = run(majority, batch)
    assert merged.values == {"p": "a", "k": 7}
    assert (merged.support, merged.sample_ids) == (6, (0, 1, 2, 3, 4, 5))


@pytest.mark.requirement("Trace's defect 21: failed proposals voted for the current value")
def test_failed_proposals_do_not_vote_for_the_current_value() -> None:
    """Empty proposals are not votes: four that ended with TERMINATE do not outweigh one that asks for a change."""
    batch = [proposal(i) for i in range(4)] + [proposal(4, p="new")]
    assert run(majority, batch)[0].values == {"p": "new"}


@pytest.mark.parametrize(("stepsize", "values"), [(1.0, ["b"]), (0.5, ["b"]), (0.4, []), (0.0, [])])
def test_majority_weighs_the_current_value(stepsize: float, values: list[str]) -> None:
    """The current value has the vote 1 - stepsize; it wins if that is more, and always at stepsize 0."""
    assert [one.values["p"] for one in run(majority, [proposal(0, p="b")], stepsize=stepsize)] == values


def test_majority_at_stepsize_zero_adds_nothing() -> None:
    """At stepsize 0 no value is added, even for a parameter without a current one."""
    assert run(majority, [proposal(0, new=1)], stepsize=0.0) == []


def test_majority_tie_goes_to_the_earlier_sample() -> None:
    """Of two values with equal votes the one with the lower sample id wins, in any order."""
    batch = [proposal(3, p="late"), proposal(1, p="early")]
    assert run(majority, batch)[0].values == {"p": "early"}
    assert run(majority, batch[::-1])[0].values == {"p": "early"}


def test_mean_moves_by_the_stepsize() -> None:
    """A number moves by stepsize towards the mean of the proposals, weighted by support."""
    batch = [Proposal(values={"t": 0.9}, support=3, sample_ids=(0,)), proposal(1, t=0.1)]
    for stepsize, expected in ((0.0, 0.5), (0.5, 0.6), (1.0, 0.7)):
        assert run(mean, batch, stepsize=stepsize)[0].values["t"] == pytest.approx(expected)


@pytest.mark.parametrize(("proposed", "moved"), [([3, 4], 3), ([5, 5], 4), ([9], 6), ([3, 3], 2), ([1, 2], 2)])
def test_mean_keeps_an_int_an_int(proposed: list[int], moved: int) -> None:
    """The mean of ints is rounded to the nearest int, halves to even."""
    (merged,) = run(mean, [proposal(i, k=k) for i, k in enumerate(proposed)])
    assert merged.values == {"k": moved}
    assert type(merged.values["k"]) is int


def test_mean_leaves_other_types() -> None:
    """Text and booleans stay in their proposals for the next rule; mean then majority merges all."""
    batch = [proposal(0, t=0.9, p="a"), proposal(1, t=0.7), proposal(2, on=False)]
    moved, text, flag = run(mean, batch)
    assert moved.values == {"t": pytest.approx(0.65)}
    assert (moved.sample_ids, text.values, flag.values) == ((0, 1), {"p": "a"}, {"on": False})
    assert [sorted(one.values) for one in run(chain(mean, majority), batch)] == [["on", "p", "t"]]


def test_mean_of_a_value_that_is_not_always_numeric() -> None:
    """One proposal of another type makes the parameter non-numeric: text is not converted to a number."""
    batch = [proposal(0, t=0.9), proposal(1, t="0.7")]
    assert run(mean, batch) == batch


def test_mean_is_exact() -> None:
    """Sums are exact: huge and tiny numbers are both counted."""
    batch = [proposal(0, t=1e16), proposal(1, t=1.0), proposal(2, t=-1e16)]
    assert run(mean, batch, stepsize=1.0)[0].values["t"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("number", [10**400, float("nan"), float("inf")])
def test_mean_leaves_numbers_that_cannot_be_averaged(number: float) -> None:
    """NaN, infinity and an int too large for a float are left out; the typed check refuses them."""
    batch = [proposal(0, t=number), proposal(1, t=0.5)]
    assert run(mean, batch) == batch
