"""What a search knows of its candidates, and what follows from it: who is better, who is worth another look. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, log, sqrt
from random import Random

import msgspec
from msgspec.structs import replace

from aggregator.records import Candidate, Decision, Values
from aggregator.training.evaluation import lowest_of
from aggregator.training.gates import compare
from aggregator.training.prompts import sort_sets


def plain(values: Values) -> Values:
    """Return values as JSON has them, so that a candidate is the same before and after a resumption."""
    found: Values = msgspec.to_builtins(sort_sets(values), enc_hook=repr)
    return found


def with_scores(
    candidate: Candidate, scores: Iterable[tuple[int, float | None]], lost: Iterable[int] = ()
) -> Candidate:
    """Return the candidate with more scores, each under its sample's id; a score of None says nothing.

    `lost` are the samples on which it was tried and not judged.

    >>> candidate = with_scores(Candidate(id="0.0", values={}), [(3, 1.0), (3, 0.0), (5, None)], lost=[5])
    >>> candidate.scores, candidate.lost
    ({'3': (1.0, 2)}, ('5',))
    """
    gone = {*candidate.lost, *map(str, lost)}
    known = dict(candidate.scores)
    for sample_id, score in scores:
        if score is not None:
            total, count = known.get(str(sample_id), (0.0, 0))
            known[str(sample_id)] = (total + score, count + 1)
    return replace(candidate, scores=known, lost=tuple(sorted(gone - set(known))))


def mean_score(candidate: Candidate) -> float:
    """Return the mean score, that of a candidate without scores below any other; lost instances count as the lowest."""
    scores = [_mean_of(entry) for entry in candidate.scores.values()]
    if not scores:
        return -inf
    scores += [lowest_of(scores)] * len(candidate.lost)
    return sum(scores) / len(scores)


def upper_bound(candidate: Candidate, trials: int, constant: float) -> float:
    """Return mean + constant * sqrt(ln(trials) / own trials): UCB1 (Auer et al., 2002), for scores in [0, 1].

    The less a candidate was tried of all `trials`, the more its score may still rise; one never tried comes first.

    >>> upper_bound(Candidate(id="0.0", values={}, scores={"3": (0.5, 1)}), 1, constant=1.0)
    0.5
    """
    if candidate.score is None:
        return inf
    return candidate.score + constant * sqrt(log(max(trials, 1)) / candidate.trials)


def compare_on_shared(before: Candidate, after: Candidate, min_score: float | None = None) -> Decision:
    """Decide between two candidates on the instances that both have been tried on; those lost are as in `compare`."""
    shared = [key for key in before.scores if key in after.scores or key in after.lost]
    tried = [_mean_of(after.scores[key]) if key in after.scores else None for key in shared]
    return compare([_mean_of(before.scores[key]) for key in shared], tried, min_score=min_score)


def gain(before: Candidate, after: Candidate, min_score: float | None = None) -> float:
    """Return by how much the mean score differs on the instances that both have been tried on."""
    decision = compare_on_shared(before, after, min_score)
    return -inf if decision.before is None or decision.after is None else decision.after - decision.before


def wins_of(candidates: Sequence[Candidate]) -> dict[str, frozenset[str]]:
    """Return the instances on which each candidate scores best, none for one that another betters.

    An instance counts once two candidates were tried on it. Another candidate betters this one where it is best on the
    same instances and on more.

    >>> a = Candidate(id="a", values={}, scores={"0": (1.0, 1), "1": (0.0, 1)})
    >>> b = Candidate(id="b", values={}, scores={"0": (0.0, 1), "1": (1.0, 1)})
    >>> [sorted(instances) for instances in wins_of([a, b]).values()]
    [['0'], ['1']]
    """
    best: dict[str, float] = {}
    tried: dict[str, int] = {}
    for candidate in candidates:
        for key, scores in candidate.scores.items():
            best[key] = max(best.get(key, -inf), _mean_of(scores))
            tried[key] = tried.get(key, 0) + 1
    wins = {
        candidate.id: frozenset(
            key for key, scores in candidate.scores.items() if tried[key] > 1 and _mean_of(scores) == best[key]
        )
        for candidate in candidates
    }
    return {own: frozenset() if any(keys < more for more in wins.values()) else keys for own, keys in wins.items()}


def draw(candidates: Sequence[Candidate], weights: Sequence[int], count: int, random: Random) -> list[Candidate]:
    """Draw up to `count` different candidates, each the likelier the more it weighs; weight 0 is never drawn."""
    left = [pair for pair in zip(candidates, weights, strict=True) if pair[1] > 0]
    found: list[Candidate] = []
    while left and len(found) < count:
        (i,) = random.choices(range(len(left)), weights=[weight for _, weight in left])
        found.append(left.pop(i)[0])
    return found


def contributors(candidate: Candidate, base: Candidate, pool: Iterable[Candidate]) -> tuple[int, ...]:
    """Return the samples whose proposals lead from one candidate to another, as far as the pool reaches back."""
    known = {other.id: other for other in pool}
    ids: set[int] = set()
    step: Candidate | None = candidate
    while step is not None and step.id != base.id:
        ids.update(step.sample_ids)
        step = known.get(step.parent or "")
    return tuple(sorted(ids))


def sources(candidate: Candidate, base: Candidate, pool: Iterable[Candidate]) -> dict[str, tuple[int, ...]]:
    """Return, for each parameter, the samples that proposed its changes from one candidate to another."""
    known = {other.id: other for other in pool}
    found: dict[str, set[int]] = {}
    step: Candidate | None = candidate
    while step is not None and step.id != base.id:
        for name, ids in step.sources.items():
            found.setdefault(name, set()).update(ids)
        step = known.get(step.parent or "")
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _mean_of(scores: tuple[float, int]) -> float:
    return scores[0] / scores[1]
