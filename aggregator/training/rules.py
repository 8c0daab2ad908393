"""Rules that merge proposals without a model: pure, deterministic, closed under `chain`.

If two proposals have equal weight, the one of the earlier sample wins, so that the order of completion never matters.
`identity` is the neutral rule. A proposal without a parameter does not vote on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import wraps
from typing import Any

from msgspec.structs import replace

from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.records import Proposal, Values
from aggregator.text import canonical_json, show_call
from aggregator.training.parts import check_rule, merge_with
from aggregator.training.step import Step, UpdateRule

_Merge = Callable[[Sequence[Proposal], Step], Sequence[Proposal]]


def _rule(merge: _Merge) -> UpdateRule:
    """Make an UpdateRule of a pure function."""

    @wraps(merge)
    async def rule(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        return merge(proposals, step)

    return rule


def chain(*rules: UpdateRule) -> UpdateRule:
    """Apply rules from left to right, as in `chain(without_failed, dedupe, top_k(8), LLMMerge(llm))`.

    Associative; `chain()` is the identity.
    """
    for rule in rules:
        check_rule(rule)

    async def chained(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
        for rule in rules:
            proposals = await merge_with(rule, proposals, step)
        return proposals

    chained.__qualname__ = show_call("chain", *rules)
    facts: Any = chained
    facts.calls_per_merge = sum(getattr(rule, "calls_per_merge", 0) for rule in rules)
    return chained


@_rule
def identity(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
    """Return the proposals unchanged: the neutral rule."""
    return proposals


@_rule
def without_failed(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
    """Drop the proposals with an error.

    >>> from aggregator.portal import call
    >>> call(without_failed, [Proposal(error="cut off"), Proposal(values={"k": 1})], Step())[0].values
    {'k': 1}
    """
    return [proposal for proposal in proposals if proposal.error is None]


@_rule
def dedupe(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
    """Merge proposals with equal values into one, with their support added up, at the position of the first.

    Its score is the mean by support; sample ids, different feedbacks and reasonings are concatenated in order.
    Proposals without values are unchanged, because their meanings may differ.

    >>> from aggregator.portal import call
    >>> found = call(dedupe, [Proposal(values={"k": 1}, sample_ids=(i,)) for i in (4, 7)], Step())
    >>> [(proposal.support, proposal.sample_ids) for proposal in found]
    [(2, (4, 7))]
    """
    groups: dict[bytes | int, list[Proposal]] = {}
    for i, proposal in enumerate(proposals):
        own = key_of(proposal.values) if proposal.values and proposal.error is None else i
        groups.setdefault(own, []).append(proposal)
    return [group[0] if len(group) == 1 else _join(group[0].values, group) for group in groups.values()]


def top_k(k: int) -> UpdateRule:
    """Keep the k proposals with the highest scores, in order; an unknown score is the lowest.

    >>> from aggregator.portal import call
    >>> scored = [Proposal(values={"k": i}, score=score) for i, score in enumerate([0.2, None, 0.9, 0.2])]
    >>> [proposal.values["k"] for proposal in call(top_k(2), scored, Step())]
    [0, 2]
    """
    if type(k) is not int or k < 1:
        raise ConfigError(f"Expected top_k of an int of at least 1, got {k!r}")

    def best(proposals: Sequence[Proposal], _step: Step) -> Sequence[Proposal]:
        scores = [-math.inf if one.score is None else one.score for one in proposals]
        ranked = sorted(range(len(proposals)), key=lambda i: (-scores[i], _first_sample(proposals[i]), i))
        return [proposals[i] for i in sorted(ranked[:k])]

    best.__qualname__ = show_call("top_k", k)
    return _rule(best)


best_of = top_k(1)
"""Keep the proposal with the highest score; of equal ones that of the earliest sample."""


@_rule
def majority(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Give each parameter the value that most instances propose.

    A value has the weight stepsize times its number of instances, the current value 1 - stepsize in addition; satisfied
    instances (`step.satisfied`) support the current value. At equal weight the current value loses. Values are compared
    as JSON: 1, 1.0 and True are three values.

    >>> from aggregator.portal import call
    >>> votes = [Proposal(values={"k": k}, sample_ids=(i,)) for i, k in enumerate([3, 5, 5, 5])]
    >>> call(majority, votes, Step(values={"k": 3}))[0].values
    {'k': 5}
    """
    current = step.values
    elected = {name: _elect(name, proposals, step) for name in _names(proposals)}
    values = {
        name: value for name, value in elected.items() if name not in current or key_of(value) != key_of(current[name])
    }
    return [_join(values, proposals)] if values and step.stepsize > 0 else []


@_rule
def mean(proposals: Sequence[Proposal], step: Step) -> Sequence[Proposal]:
    """Move each numeric parameter by stepsize towards the mean of the proposals, weighted by support.

    Satisfied instances (`step.satisfied`) count as proposals of the current value. An int is rounded, halves to even.
    Other parameters stay in the proposals for the next rule, as in `chain(mean, majority)`. Sums are exact, so the
    order of the proposals does not matter.

    >>> from aggregator.portal import call
    >>> votes = [Proposal(values={"t": t}) for t in (0.2, 0.4)]
    >>> round(call(mean, votes, Step(values={"t": 0.7}))[0].values["t"], 6)
    0.5
    """
    current = step.values
    proposed = {name: [one.values[name] for one in proposals if name in one.values] for name in _names(proposals)}
    numeric = [name for name, values in proposed.items() if all(map(is_finite, (*values, current.get(name, 0))))]
    if not numeric:
        return proposals
    moved = {name: _move(name, proposals, step) for name in numeric}
    movers = [proposal for proposal in proposals if any(name in proposal.values for name in numeric)]
    rest = [_left(proposal, numeric) for proposal in proposals]
    return [_join(moved, movers), *(proposal for proposal in rest if proposal.values or proposal.error is not None)]


def key_of(value: Any) -> bytes:
    """Encode a value so that equal ones give equal bytes.

    1, 1.0 and True are three values; the order of keys is ignored.
    """
    return canonical_json(value, repr)


def _first_sample(proposal: Proposal) -> float:
    return min(proposal.sample_ids, default=math.inf)


def _in_sample_order(proposals: Sequence[Proposal]) -> list[Proposal]:
    return sorted(proposals, key=_first_sample)


def _names(proposals: Sequence[Proposal]) -> list[str]:
    return list(dict.fromkeys(name for proposal in _in_sample_order(proposals) for name in proposal.values))


def _elect(name: str, proposals: Sequence[Proposal], step: Step) -> Any:
    """Count the votes on one parameter; ties go to the earlier sample, the current value comes last."""
    current, share = step.values, Fraction(step.stepsize)
    weights: dict[bytes, Fraction] = {}
    values: dict[bytes, Any] = {}
    for proposal in _in_sample_order(proposals):
        if name in proposal.values:
            key = key_of(proposal.values[name])
            values.setdefault(key, proposal.values[name])
            weights[key] = weights.get(key, Fraction(0)) + share * proposal.support
    if name in current:
        key = key_of(current[name])
        values.setdefault(key, current[name])
        weights[key] = weights.get(key, Fraction(0)) + 1 - share + share * step.satisfied
    return values[max(weights, key=weights.__getitem__)]


def _move(name: str, proposals: Sequence[Proposal], step: Step) -> int | float:
    current = step.values
    voters = [proposal for proposal in proposals if name in proposal.values]
    support = sum(proposal.support for proposal in voters)
    total = sum(Fraction(proposal.values[name]) * proposal.support for proposal in voters)
    start = Fraction(current[name]) if name in current else total / support
    target = (total + start * step.satisfied) / (support + step.satisfied)
    moved = start + Fraction(step.stepsize) * (target - start)
    whole = isinstance(current.get(name, voters[0].values[name]), int)
    return round(moved) if whole else float(moved)


def _left(proposal: Proposal, taken: Sequence[str]) -> Proposal:
    values = {name: value for name, value in proposal.values.items() if name not in taken}
    return proposal if len(values) == len(proposal.values) else replace(proposal, values=values)


def _join(values: Values, proposals: Sequence[Proposal]) -> Proposal:
    """Return one proposal of these values, supported by all the others."""
    ordered = _in_sample_order(proposals)
    return Proposal(
        values=values,
        score=_mean_score(ordered),
        feedback=_join_texts([proposal.feedback for proposal in ordered]),
        reasoning=_join_texts([proposal.reasoning for proposal in ordered]),
        failures=tuple(failure for proposal in ordered for failure in proposal.failures),
        support=sum(proposal.support for proposal in ordered),
        sample_ids=tuple(dict.fromkeys(i for proposal in ordered for i in proposal.sample_ids)),
    )


def _mean_score(proposals: Sequence[Proposal]) -> float | None:
    scored = [(Fraction(p.score), p.support) for p in proposals if p.score is not None and math.isfinite(p.score)]
    support = sum(count for _, count in scored)
    return float(sum(score * count for score, count in scored) / support) if support else None


def _join_texts(texts: Sequence[str]) -> str:
    return "\n".join(dict.fromkeys(text for text in texts if text))
