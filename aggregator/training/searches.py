"""Searches: which candidates are explored, tried, made current and remembered. Pure decisions over candidates.

`greedy` is the neutral search: one set of values, changed by each accepted update. The others keep a pool of
candidates; a custom search overrides single methods, or implements all of them (`step.Search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from math import inf, log, sqrt
from random import Random
from typing import Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from aggregator.checks import check_finite, check_positive, is_int
from aggregator.errors import ConfigError
from aggregator.protocols import AnyGuide
from aggregator.records import Candidate, Decision, Rollout, Sample, Values
from aggregator.text import show_call
from aggregator.training.batches import Dataset, samples
from aggregator.training.evaluation import lowest_of
from aggregator.training.gates import by_name, check_score_name, compare
from aggregator.training.merge import key_of
from aggregator.training.prompts import sort_sets
from aggregator.training.step import Step

# ---- candidates


def plain(values: Values) -> Values:
    """Return values as JSON stores them, so that a candidate is the same before and after a resume."""
    found: Values = msgspec.to_builtins(sort_sets(values), enc_hook=repr)
    return found


def pool_of(found: Sequence[Candidate], step: Step) -> list[Candidate]:
    """Return the pool of a step, the current candidate first: that of the current values, or a new one."""
    key = key_of(plain(step.values)) if found else b""
    at = next((i for i, candidate in enumerate(found) if key_of(candidate.values) == key), None)
    if at is None:
        return [Candidate(id=f"{step.number}.0", values=step.values, step=step.number), *found]
    return [found[at], *found[:at], *found[at + 1 :]]


def with_scores(
    candidate: Candidate, scores: Iterable[tuple[int, float | None]], lost: Iterable[int] = ()
) -> Candidate:
    """Return the candidate with more scores, each under its sample's id; a score of None is left out.

    `lost` are the samples on which it was tried, but not judged.

    >>> candidate = with_scores(Candidate(id="0.0", values={}), [(3, 1.0), (3, 0.0), (5, None)], lost=[5])
    >>> candidate.scores, candidate.lost
    ({'3': (1.0, 2)}, ('5',))
    """
    every = {*candidate.lost, *map(str, lost)}
    known = dict(candidate.scores)
    for sample_id, score in scores:
        if score is not None:
            total, count = known.get(str(sample_id), (0.0, 0))
            known[str(sample_id)] = (total + score, count + 1)
    return replace(candidate, scores=known, lost=tuple(sorted(every - set(known))))


def with_named(candidate: Candidate, names: Iterable[str], rollouts: Sequence[Rollout]) -> Candidate:
    """Return the candidate with these rollouts' named scores; measures for which lower is better are negated."""
    known = dict(candidate.named)
    for name in names if rollouts else ():
        for run in by_name(rollouts, name):
            if run.score is not None:
                total, count = known.get(key := f"{name}/{run.sample_id}", (0.0, 0))
                known[key] = (total + run.score, count + 1)
    return replace(candidate, named=known)


def mean_score(candidate: Candidate) -> float:
    """Return the mean score, the lowest possible for a candidate without scores; lost instances count as the lowest."""
    scores = [_mean_of(entry) for entry in candidate.scores.values()]
    if not scores:
        return -inf
    scores += [lowest_of(scores)] * len(candidate.lost)
    return sum(scores) / len(scores)


def upper_bound(candidate: Candidate, trials: int, constant: float) -> float:
    """Return mean + constant * sqrt(ln(trials) / own trials): UCB1 (Auer et al., 2002), for scores in [0, 1].

    A candidate with few of all `trials` has a higher bound; one without any comes first.

    >>> upper_bound(Candidate(id="0.0", values={}, scores={"3": (0.5, 1)}), 1, constant=1.0)
    0.5
    """
    if candidate.score is None:
        return inf
    return candidate.score + constant * sqrt(log(max(trials, 1)) / candidate.trials)


# ---- comparing candidates


def compare_on_shared(before: Candidate, after: Candidate, min_score: float | None = None) -> Decision:
    """Compare two candidates on the instances that both were tried on; lost ones are treated as in `compare`."""
    shared = [key for key in before.scores if key in after.scores or key in after.lost]
    tried = [_mean_of(after.scores[key]) if key in after.scores else None for key in shared]
    return compare([_mean_of(before.scores[key]) for key in shared], tried, min_score=min_score)


def gain(before: Candidate, after: Candidate, min_score: float | None = None) -> float:
    """Return the difference of the mean scores on the instances that both were tried on."""
    decision = compare_on_shared(before, after, min_score)
    return -inf if decision.before is None or decision.after is None else decision.after - decision.before


def wins_of(candidates: Sequence[Candidate]) -> dict[str, frozenset[str]]:
    """Return the instances on which each candidate scores best, or none for a dominated candidate.

    An instance counts once two candidates were tried on it, and again for each named score. A candidate is dominated by
    one that is best on the same instances and on more.

    >>> a = Candidate(id="a", values={}, scores={"0": (1.0, 1), "1": (0.0, 1)})
    >>> b = Candidate(id="b", values={}, scores={"0": (0.0, 1), "1": (1.0, 1)})
    >>> [sorted(instances) for instances in wins_of([a, b]).values()]
    [['0'], ['1']]
    """
    best: dict[str, float] = {}
    tried: dict[str, int] = {}
    shown = {candidate.id: {**candidate.scores, **candidate.named} for candidate in candidates}
    for found in shown.values():
        for key, scores in found.items():
            best[key] = max(best.get(key, -inf), _mean_of(scores))
            tried[key] = tried.get(key, 0) + 1
    wins = {
        own: frozenset(key for key, scores in found.items() if tried[key] > 1 and _mean_of(scores) == best[key])
        for own, found in shown.items()
    }
    return {own: frozenset() if any(keys < more for more in wins.values()) else keys for own, keys in wins.items()}


def draw(candidates: Sequence[Candidate], weights: Sequence[int], count: int, random: Random) -> list[Candidate]:
    """Draw up to `count` different candidates, with their weights as probabilities; weight 0 is never drawn."""
    left = [pair for pair in zip(candidates, weights, strict=True) if pair[1] > 0]
    found: list[Candidate] = []
    while left and len(found) < count:
        (i,) = random.choices(range(len(left)), weights=[weight for _, weight in left])
        found.append(left.pop(i)[0])
    return found


def contributors(candidate: Candidate, base: Candidate, pool: Iterable[Candidate]) -> tuple[int, ...]:
    """Return the samples whose proposals lead from one candidate to another, as far as the pool goes back."""
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


ScoreFunction = Literal["mean", "ucb"]
"""How candidates are ranked: by mean score, or by its upper bound."""

Trials = Sequence[tuple[Candidate, Sequence[Sample]]]
Choice = tuple[Candidate | None, Decision]
"""The candidate that should become current, or the best refused one, or none; and the decision."""


# ---- searches


class Greedy:
    """Has only the current values, changed by every update that the gate accepts.

    `is_single` means that there is one candidate: no pool is kept, and lineages do not name it. `tries` means that
    new candidates are run before one is chosen, which a plan counts.
    """

    is_single = True
    tries = False
    proposals = 1
    guide: Any = None

    def __repr__(self) -> str:
        return "greedy"

    def explore(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        """Return the current candidate."""
        return pool[:1]

    def trials(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Trials:
        """Return nothing: only the gate compares."""
        return []

    def choose(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Choice:
        """Return the new candidate; the gate decides."""
        if not made:
            return None, Decision(accepted=False, reason="the update has no new values")
        return made[0], Decision(accepted=True)

    def keep(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        """Return the current candidate."""
        return pool[:1]


greedy: Greedy = Greedy()
"""The neutral search: one set of values, changed by each accepted update."""


class BestOf(Greedy):
    """Makes several proposals from the current values and uses the best, or none if the current values are as good.

    They are tried on the minibatch, or on `validate_dataset`; `validate_guide` judges the trials instead of the run's
    guide.
    """

    tries = True

    def __init__(
        self, proposals: int = 4, validate_dataset: Dataset | None = None, validate_guide: AnyGuide | None = None
    ) -> None:
        check_positive("num_proposals", proposals)
        self.proposals = proposals
        self.validation = _validation(validate_dataset)
        self.guide = validate_guide

    def trials(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Trials:
        """Return all candidates, if there is one to compare with the current one."""
        return [(candidate, self.validation or step.samples) for candidate in (*explored, *made) if made]

    def choose(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Choice:
        """Return the candidate with the highest mean; of equal ones the earlier, the current one first."""
        best = max((explored[0], *made), key=partial(gain, explored[0], min_score=step.min_score))
        if not compare_on_shared(explored[0], best, step.min_score).accepted:
            best = explored[0]
        return super().choose(explored, [] if best is explored[0] else [best], step)


class Priority:
    """Keeps the best candidates, explores the most promising ones on each minibatch, and makes the best one current.

    A step explores the current candidate and the best others of the pool, `num_candidates` in all (up to 4), makes
    `num_proposals` new ones of each, tries these, and remembers the best `memory_size`. A candidate becomes current if
    it scores higher than the current one on the instances that both were tried on, unless the gate refuses it.

    New candidates are tried on the minibatch; with `validate_dataset` every candidate is tried once on that, and only
    those scores count. `validate_guide` judges these trials instead of the run's guide.

    `score_function="ucb"` ranks by mean + ucb_exploration_constant * sqrt(ln(trials of all) / own trials), so that
    candidates with few trials are explored too: UCB1 (Auer et al., 2002, "Finite-time Analysis of the Multiarmed Bandit
    Problem"). Scores should be in [0, 1]; for others scale the constant.
    """

    def __init__(
        self,
        memory_size: int = 16,
        *,
        num_candidates: int | None = None,
        num_proposals: int = 1,
        score_function: ScoreFunction = "mean",
        ucb_exploration_constant: float = 1.0,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
    ) -> None:
        if num_candidates is None:
            num_candidates = min(4, memory_size) if is_int(memory_size) else 4
        check_positive("num_candidates", num_candidates)
        check_positive("num_proposals", num_proposals)
        check_positive("memory_size", memory_size)
        if memory_size < num_candidates:
            raise ConfigError(
                f"Expected memory_size of at least num_candidates={num_candidates}, which are explored from it, "
                f"got {memory_size}"
            )
        if score_function not in get_args(ScoreFunction):
            raise ConfigError(f"Expected score_function 'mean' or 'ucb', got {score_function!r}")
        check_finite("ucb_exploration_constant", ucb_exploration_constant, least=0)
        self.memory_size = memory_size
        self.num_candidates = num_candidates
        self.proposals = num_proposals
        self.score_function = score_function
        self.ucb_exploration_constant = ucb_exploration_constant
        self.validation = _validation(validate_dataset)
        self.guide = validate_guide

    def __repr__(self) -> str:
        return show_call(type(self).__name__.lower(), self.memory_size, num_proposals=self.proposals)

    def explore(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        """Return the current candidate and the best others."""
        current, *others = pool
        return [current, *self.rank(others)[: self.num_candidates - 1]]

    def trials(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Trials:
        """Return the new candidates, and the explored ones with their minibatch scores.

        If a validation set or the search's own guide judges, each candidate is tried on the instances that it lacks.
        """
        if not self.validation and self.guide is None:
            return [(candidate, step.samples) for candidate in (*explored, *self.due(explored, made))]
        return [
            (candidate, [one for one in self.validation or step.samples if str(one.id) not in candidate.scores])
            for candidate in self.due(explored, made)
        ]

    def due(self, explored: Sequence[Candidate], made: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates to run on further instances."""
        if not self.validation and self.guide is None:
            return list(made)
        return [*explored, *made]

    def choose(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Choice:
        """Return the best candidate by this step's scores.

        If none is better than the current one the best new one is returned with its refusal, which the next step's
        optimizer sees.
        """
        current = explored[0]
        better = [one for one in (*explored, *made) if compare_on_shared(current, one, step.min_score).accepted]
        best = max(better or made, key=partial(gain, current, min_score=step.min_score), default=None)
        if best is None:
            return None, Decision(accepted=False, reason="no new candidate was proposed")
        return best, compare_on_shared(current, best, step.min_score)

    def keep(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        """Return the current candidate and the best others."""
        current, *others = pool
        return [current, *self.rank(others)[: self.memory_size - 1]]

    def rank(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Return candidates from the best to the worst by the score function; of equal ones the newer comes first."""
        candidates = list(candidates)
        trials = sum(candidate.trials for candidate in candidates)

        def priority(candidate: Candidate) -> float:
            if self.score_function == "mean":
                return mean_score(candidate)
            return upper_bound(candidate, trials, self.ucb_exploration_constant)

        return sorted(candidates, key=lambda candidate: (-priority(candidate), -candidate.step))


class Sequential(Priority):
    """Has one candidate, which is replaced by the best of its `num_proposals` successors if that one is better."""

    def __init__(
        self, num_proposals: int = 1, *, validate_dataset: Dataset | None = None, validate_guide: AnyGuide | None = None
    ) -> None:
        super().__init__(
            1,
            num_candidates=1,
            num_proposals=num_proposals,
            validate_dataset=validate_dataset,
            validate_guide=validate_guide,
        )


class Succeeding(Sequential):
    """Has one candidate, which is always replaced by its successor, or by the best one of several."""

    @property
    def tries(self) -> bool:
        """Return True if it compares several successors."""
        return self.proposals > 1

    def due(self, explored: Sequence[Candidate], made: Sequence[Candidate]) -> list[Candidate]:
        """Return the new candidates, if there is a choice between several."""
        return list(made) if len(made) > 1 else []

    def choose(self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step) -> Choice:
        """Return the best new candidate, which is accepted."""
        if not made:
            return super().choose(explored, made, step)
        return max(made, key=mean_score), Decision(accepted=True, reason="the successor is always accepted")


class Beam(Priority):
    """Explores every candidate that it remembers: the `num_candidates` best of the last beam and its new candidates."""

    def __init__(
        self,
        num_candidates: int = 4,
        *,
        num_proposals: int = 2,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
    ) -> None:
        super().__init__(
            num_candidates,
            num_candidates=num_candidates,
            num_proposals=num_proposals,
            validate_dataset=validate_dataset,
            validate_guide=validate_guide,
        )


class Pareto(Priority):
    """Keeps the candidates that are best on at least one instance, and explores those that are best on many.

    A specialist that the mean would drop is kept, and can be improved further. Candidates are drawn, next to the
    current one, with the number of instances that they are best on as their weight. The idea is GEPA's (Agrawal et al.,
    2025, "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning"). It needs scores of many candidates
    on the same instances: give a `validate_dataset`.

    `scores` are names of further scores: those of a guide's `Scores`, or `cost`, `length` and `milliseconds`, for which
    lower is better. A candidate that is best on an instance by one of them is kept too.
    """

    def __init__(
        self,
        memory_size: int = 16,
        *,
        scores: Sequence[str] = (),
        num_candidates: int | None = None,
        num_proposals: int = 1,
        score_function: ScoreFunction = "mean",
        ucb_exploration_constant: float = 1.0,
        validate_dataset: Dataset | None = None,
        validate_guide: AnyGuide | None = None,
    ) -> None:
        super().__init__(
            memory_size,
            num_candidates=num_candidates,
            num_proposals=num_proposals,
            score_function=score_function,
            ucb_exploration_constant=ucb_exploration_constant,
            validate_dataset=validate_dataset,
            validate_guide=validate_guide,
        )
        if isinstance(scores, str):
            raise ConfigError(f"Expected scores as a list of names, got {scores!r}; give [{scores!r}]")
        for name in scores:
            check_score_name(name)
        self.scores = tuple(scores)

    def explore(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        """Return the current candidate, and others drawn by the number of instances on which they are best."""
        current, *others = pool
        wins = wins_of(pool)
        random = Random(f"{step.seed}/{step.number}/explore")  # noqa: S311 - a choice, not a secret
        weights = [len(wins[candidate.id]) for candidate in others]
        return [current, *draw(others, weights, self.num_candidates - 1, random)]

    def keep(self, pool: Sequence[Candidate], step: Step) -> Sequence[Candidate]:
        """Return the current candidate and those that are best somewhere, at most `memory_size`."""
        current, *others = pool
        wins = wins_of(pool)
        best = [candidate for candidate in self.rank(others) if wins[candidate.id]]
        best.sort(key=lambda candidate: -len(wins[candidate.id]))
        return [current, *best[: self.memory_size - 1]]


beam, pareto, priority, sequential = Beam, Pareto, Priority, Sequential
"""As in `Trainer(..., search=beam(4))`."""


def _validation(dataset: Dataset | None) -> tuple[Sample, ...]:
    return () if dataset is None else samples(dataset, name="validate_dataset")
