"""Scores of given values: `step.evaluate` in a run and alone, `evaluate` outside a run, and `headroom` before one.

`headroom` measures with a few repeated rollouts whether a run could gain anything, before it is paid for.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random
from statistics import fmean, pstdev
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.adapters.agents import CalledAgent, as_agent
from aggregator.agents.parameters import overriding, read, values_of
from aggregator.cassettes.lineage import current_lineage, lineage
from aggregator.checks import check_positive, is_finite
from aggregator.errors import ConfigError, TrainingWarning
from aggregator.executors.local import MAX_CONCURRENCY, LocalExecutor
from aggregator.executors.work import AgentWork, root_of
from aggregator.guides.calling import check_guide, declared_limit
from aggregator.llm.observed import Clients, observed
from aggregator.portal import sync_function
from aggregator.protocols import Agent, AnyGuide
from aggregator.records import Failure, Rollout, RolloutTask, Sample, Values
from aggregator.training.batches import Dataset, samples
from aggregator.training.checkpoints import Known, Memory, Score
from aggregator.training.identity import digest, identity_of

Evaluate = Callable[..., Awaitable[list[Rollout]]]
"""`Step.evaluate` of one step: (values, samples, *, guide, repeats, fresh) -> rollouts."""

RunTasks = Callable[[Sequence[RolloutTask], Any], Awaitable[Sequence[Rollout]]]
"""Runs (tasks, guide) and returns the rollouts in the order of the tasks."""

KEPT_STEPS = 16
"""For how many steps a score is remembered that no step requests."""


# ---- scores paid once


class Evaluations:
    """Evaluates values and remembers their scores, so that gates, searches and rules pay for each once.

    A score belongs to (values, sample, guide, repeat). Concurrent evaluations of the same values wait for one another.
    The calls of an evaluation are recorded under `values=<digest>/sample=<id>`, below the place of the step,
    for every caller; with a guide other than the run's, `guide=<digest>` comes in between.
    """

    def __init__(
        self,
        run: RunTasks,
        guide: Any,
        parameters: Sequence[Any],
        *,
        min_score: float | None = None,
        known: Memory | None = None,
        repeats: int = 1,
    ) -> None:
        self.known: Memory = dict(known or {})
        self._run = run
        self._guide = guide
        self._parameters = parameters
        self._min_score = min_score
        self._repeats = repeats
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._guides: dict[int, tuple[Any, str]] = {}  # kept alive, as its id is the key

    def at(self, step: int, place: Sequence[str] = ()) -> Evaluate:
        """Return the `evaluate` of one step, whose calls are recorded under `place`."""
        return partial(self._evaluate, step, tuple(place))

    async def _evaluate(
        self,
        step: int,
        place: tuple[str, ...],
        values: Values,
        samples: Sequence[Sample],
        *,
        guide: Any = None,
        repeats: int | None = None,
        fresh: bool = False,
    ) -> list[Rollout]:
        count = self._repeats if repeats is None else repeats
        check_positive("repeats", count)
        guide = self._guide if guide is None else guide
        judge = self._name(guide)
        with overriding(self._parameters, values):  # each in its own type, and with one digest
            typed = values_of(self._parameters)
        name = digest(typed)
        place = (*place, f"values={name}", *((f"guide={judge}",) if judge else ()))
        keys = [
            (f"{judge}/{sample.id}/{digest([sample.x, sample.info])}/{i}", sample, i)
            for sample in samples
            for i in range(count)
        ]
        async with self._locks.setdefault((name, judge), asyncio.Lock()):
            known = {} if fresh or name not in self.known else self.known[name].scores
            lowest = self._min_score if guide is self._guide else declared_limit(guide, "min_score")
            missing = {key: _task(typed, place, sample, i, lowest) for key, sample, i in keys if key not in known}
            made = await run_again(self._run, list(missing.values()), guide) if missing else ()
            new = dict(zip(missing, made, strict=True))
            self._remember(step, name, new)
        runs = [new[key] if key in new else _recall(known[key], sample, i) for key, sample, i in keys]
        if repeats is not None:
            return runs
        return [join_repeats(runs[i : i + count]) for i in range(0, len(runs), count)]

    def _name(self, guide: Any) -> str:
        """Return "" for the run's own guide, and a digest for another one, constant during the run."""
        if guide is self._guide:
            return ""
        if id(guide) not in self._guides:
            check_guide(guide)
            self._guides[id(guide)] = (guide, guide_digest(guide))
        return self._guides[id(guide)][1]

    def _remember(self, step: int, name: str, rollouts: dict[str, Rollout]) -> None:
        """Add scores, except those of lost instances, which do not depend on the values."""
        kept = {
            key: Score(run.score, dict(run.scores), run.failure)
            for key, run in rollouts.items()
            if run.failure is None or not is_lost(run.failure)
        }
        before = self.known[name].scores if name in self.known else {}
        self.known[name] = Known(step, {**before, **kept})

    def forget(self, step: int, in_use: Sequence[Values] = ()) -> Memory:
        """Drop scores that no step has requested lately, except those of values in use, and return the others."""
        if not self.known:
            return {}
        used = set(map(digest, in_use))
        kept = sorted(name for name in self.known if name in used or self.known[name].step > step - KEPT_STEPS)
        self.known = {name: self.known[name] for name in kept}
        self._locks = {}
        return dict(self.known)


def _task(values: Values, place: tuple[str, ...], sample: Sample, repeat: int, lowest: float | None) -> RolloutTask:
    return RolloutTask(
        sample=sample,
        values=values,
        lineage=(*place, f"sample={sample.id}", *((f"repeat={repeat}",) if repeat else ())),
        capture=False,
        repeat=repeat,
        min_score=lowest,
    )


def _recall(score: Score, sample: Sample, repeat: int) -> Rollout:
    return Rollout(
        sample_id=sample.id, x=sample.x, score=score.score, scores=score.scores, failure=score.failure, repeat=repeat
    )


# ---- scores of rollouts


def guide_digest(guide: Any) -> str:
    """Return a short hash of a guide: its name, its code and its settings.

    >>> guide_digest(lambda x: 1) == guide_digest(lambda x: 1), guide_digest(lambda x: 1) == guide_digest(lambda x: 2)
    (True, False)
    """
    return digest(identity_of(guide))


def is_lost(record: Failure) -> bool:
    """Return True if an instance was lost: a call, the guide or the optimizer failed, but not the agent."""
    return record.infrastructure or (record.stage != "agent" and record.error != "SuggestionError")


def is_crash(run: Rollout) -> bool:
    """Return True if the agent itself failed, which counts as the worst result."""
    return run.failure is not None and not is_lost(run.failure)


def lowest_of(*series: Sequence[float | None], min_score: float | None = None) -> float:
    """Return the score of an instance on which the agent failed: `min_score`, else the lowest score, at most 0.

    >>> lowest_of([0.5, None], [0.9]), lowest_of([-2.0]), lowest_of([0.5], min_score=0.1)
    (0.0, -2.0, 0.1)
    """
    if min_score is not None:
        return min_score
    return min(0.0, *(score for scores in series for score in scores if score is not None), 0.0)


def scores_of(rollouts: Sequence[Rollout], lowest: float | None = None) -> list[float | None]:
    """Return the score of each rollout: `lowest` if the agent failed, None if the instance was not judged."""
    return [lowest if run.score is None and is_crash(run) else run.score for run in rollouts]


def join_repeats(runs: Sequence[Rollout]) -> Rollout:
    """Return one rollout for several of the same instance: the worst one, with the mean of the scores.

    A repeat that was not judged is left out; one on which the agent failed without a score counts as the lowest of the
    others, at most 0.

    >>> join_repeats([Rollout(sample_id=3, score=1.0, output="a"), Rollout(sample_id=3, score=0.0, output="b")]).score
    0.5
    """
    judged = [run for run in runs if run.score is not None or is_crash(run)]
    known = [run.score for run in judged if run.score is not None]
    if len(runs) == 1 or not known:
        return (judged or list(runs))[0]
    scores = [score for score in scores_of(judged, lowest_of(known)) if score is not None]
    worst = judged[scores.index(min(scores))]
    named = {
        name: fmean(run.scores[name] for run in judged if name in run.scores)
        for name in dict.fromkeys(name for run in judged for name in run.scores)
    }
    return replace(worst, score=fmean(scores), scores=named, repeat=0, lineage=runs[0].lineage)


async def run_again(run: RunTasks, tasks: Sequence[RolloutTask], guide: Any) -> list[Rollout]:
    """Run tasks, and once more those with lost calls, under `retry=1` of their lineage."""
    found = list(await run(tasks, guide))
    due = [i for i, rollout in enumerate(found) if rollout.failure is not None and rollout.failure.infrastructure]
    if due:
        again = [replace(tasks[i], lineage=(*tasks[i].lineage, "retry=1")) for i in due]
        for i, rollout in zip(due, await run(again, guide), strict=True):
            found[i] = rollout
    return found


def alone(agent: Agent) -> RunTasks:
    """Yield a function that runs tasks outside a run, in its own threads, which end with the last task."""

    async def run(tasks: Sequence[RolloutTask], guide: Any) -> Sequence[Rollout]:
        async with LocalExecutor() as executor:
            return await executor.map(AgentWork(agent, guide, call=executor.call), tasks)

    return run


def mean(scores: Sequence[float | None]) -> float | None:
    """Return the mean of the known scores, or None without one.

    >>> mean([1.0, None, 0.0])
    0.5
    """
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def failures_of(runs: Sequence[Rollout]) -> tuple[Failure, ...]:
    """Return the failures of a series of rollouts, in order."""
    return tuple(run.failure for run in runs if run.failure is not None)


# ---- evaluating an agent


async def aevaluate(
    agent: Any,
    guide: AnyGuide,
    inputs: Sequence[Any] | Dataset,
    infos: Sequence[Any] | None = None,
    *,
    min_score: float | None = None,
    max_concurrency: int = MAX_CONCURRENCY,
    clients: Clients = None,
) -> list[float | None]:
    """Return one score per instance; None if a call was lost or the guide failed, which is not 0.

    `agent` is anything that `as_agent` accepts, or a callable of an input. `inputs` and `infos` are two sequences as in
    Trace, or `inputs` is a whole data set. An instance on which the agent itself fails scores `min_score`, by default
    the minimum that the guide declares. With `clients="all"` a call that the agent's own client loses is lost, and no
    failure of the agent (see `Trainer`). If instances have no score a TrainingWarning gives their number, and why the
    first has none. Raises ConfigError for an invalid argument, and what ends a run: BudgetExceededError, CassetteError.

    >>> from aggregator import exact_match
    >>> evaluate(str.upper, exact_match, [("a", "A"), ("b", "C")])
    [1.0, 0.0]
    """
    check_guide(guide)
    check_positive("max_concurrency", max_concurrency)
    min_score = declared_limit(guide, "min_score") if min_score is None else min_score
    is_bare = callable(agent) and not isinstance(agent, type) and not hasattr(agent, "parameters")
    work_of: Agent = CalledAgent(agent) if is_bare else as_agent(agent)
    dataset: Any = inputs if infos is None else {"inputs": inputs, "infos": infos}
    place = tuple(filter(None, (current_lineage(), "evaluate")))
    tasks = [
        RolloutTask(sample=sample, lineage=(*place, f"sample={sample.id}"), capture=False, min_score=min_score)
        for sample in samples(dataset, name="dataset")
    ]
    async with LocalExecutor(max_concurrency) as executor:
        with observed(clients):
            runs = await executor.map(AgentWork(work_of, guide, call=executor.call), tasks)
    failures = [run.failure for run in runs if run.score is None and run.failure is not None]
    if failures:
        first = failures[0]
        warnings.warn(
            f"{len(failures)} of {len(runs)} instances have no score; the first, instance {first.sample_id}, failed in "
            f"the {first.stage}: {first.error}: {first.message}",
            TrainingWarning,
            stacklevel=2,
        )
    return [run.score for run in runs]


evaluate = sync_function(aevaluate)


# ---- headroom


class Headroom(Struct, frozen=True, kw_only=True):
    """What repeated rollouts of the untrained agent show.

    `score` is the mean over instances of their mean score, None if none was judged. `spread` is the standard deviation
    of the instances' means, `noise` the mean standard deviation of one instance's repeats. `undecided` is the share of
    instances whose repeats differ: neither always right nor always wrong. `perfect` is the share that reached the best
    score in every repeat, None if the best score is not known. `identical` is True if all repeats of all instances gave
    the same output, as with a seed, a temperature of 0 or a cache: then `undecided` says nothing.
    """

    instances: int
    judged: int
    repeats: int
    score: float | None
    spread: float
    noise: float
    undecided: float
    perfect: float | None = None
    identical: bool = False
    failures: Sequence[Failure] = ()

    @property
    def verdict(self) -> str:
        """The meaning of the figures for a run, in a sentence."""
        if self.score is None:
            return "No instance was judged; look at the failures first."
        if self.judged < self.instances and (self.perfect == 1 or self.undecided == 0):
            return f"{self.instances - self.judged} of {self.instances} instances were not judged; look at these first."
        if self.perfect == 1:
            return "Nothing to gain: every instance reached the best score in every repeat."
        if self.identical:
            return "The repeats are identical, because of a seed, a temperature of 0 or a cache: they show no spread."
        if self.undecided == 0:
            return "Little to gain from wording: every instance scores the same in every repeat."
        return f"Something to gain: {self.undecided:.0%} of the instances are sometimes better and sometimes worse."

    def __str__(self) -> str:
        known = "" if self.perfect is None else f", {self.perfect:.0%} always perfect"
        score = "unknown" if self.score is None else f"{self.score:.4g} +- {self.spread:.2g}"
        lost = f", {self.instances - self.judged} not judged" if self.judged < self.instances else ""
        return (
            f"score {score} over {self.instances} instances of {self.repeats} rollouts{lost}: "
            f"{self.undecided:.0%} undecided{known}, noise {self.noise:.2g}. {self.verdict}"
        )


async def aheadroom(
    agent: Any,
    guide: Any,
    data: Dataset,
    *,
    repeats: int = 4,
    sample: int | None = 16,
    max_score: float | None = None,
    min_score: float | None = None,
    seed: int = 0,
    clients: Clients = None,
) -> Headroom:
    """Run the agent `repeats` times on `sample` instances, drawn by `seed` (None: on all), and return what they show.

    `max_score` is the best score; by default `guide.max_score`, never the highest score observed. An instance on which
    the agent fails scores `min_score`, or the guide's declared `min_score`. Without either a failure counts as the
    lowest score, at most 0, if other repeats were judged, and an instance that always fails is not judged. Raises
    ConfigError for invalid arguments, and what ends a run.
    """
    check_guide(guide)
    check_positive("repeats", repeats)
    if repeats < 2:
        raise ConfigError(f"Expected repeats of at least 2, to see whether rollouts differ, got {repeats}")
    best = declared_limit(guide, "max_score") if max_score is None else max_score
    worst = declared_limit(guide, "min_score") if min_score is None else min_score
    for name, value in (("max_score", best), ("min_score", worst)):
        if value is not None and not is_finite(value):
            raise ConfigError(f"Expected {name} to be a finite number or None, got {value!r}")
    found = samples(data, name="data")
    if sample is not None:
        check_positive("sample", sample)
        chosen = Random(f"{seed}/headroom").sample(range(len(found)), min(sample, len(found)))  # noqa: S311 - no secret
        found = tuple(found[i] for i in sorted(chosen))
    known = as_agent(agent)
    parameters: Any = known.parameters()
    evaluate = Evaluations(alone(known), guide, parameters, min_score=worst).at(0, ("headroom",))
    with lineage("headroom"), observed(clients):
        try:
            runs = await evaluate(read(parameters), found, repeats=repeats, fresh=True)
        except BaseExceptionGroup as group:
            raise root_of(group) from None
    return summarise(runs, repeats, best)


def summarise(runs: Sequence[Rollout], repeats: int, max_score: float | None = None) -> Headroom:
    """Compute the figures from rollouts that are ordered by instance, with `repeats` of each.

    >>> from aggregator.records import Rollout
    >>> runs = [Rollout(sample_id=i // 2, score=score) for i, score in enumerate([1.0, 0.0, 1.0, 1.0])]
    >>> found = summarise(runs, 2, 1.0)
    >>> found.score, found.undecided, found.perfect
    (0.75, 0.5, 0.5)
    """
    groups = [runs[i : i + repeats] for i in range(0, len(runs), repeats)]
    lowest = lowest_of([run.score for run in runs])
    tried = [group if any(run.score is not None for run in group) else () for group in groups]
    scores = [[score for score in scores_of(group, lowest) if score is not None] for group in tried]
    judged = [own for own in scores if own]
    means = [fmean(own) for own in judged]
    outputs = [[repr(run.output) for run in group] for group in groups]
    return Headroom(
        instances=len(groups),
        judged=len(judged),
        repeats=repeats,
        score=fmean(means) if means else None,
        spread=pstdev(means) if means else 0.0,
        noise=fmean(map(pstdev, judged)) if judged else 0.0,
        undecided=sum(len(set(own)) > 1 for own in judged) / len(judged) if judged else 0.0,
        perfect=None
        if max_score is None or not judged
        else sum(all(score >= max_score for score in own) for own in judged) / len(judged),
        identical=all(len(set(own)) == 1 for own in outputs) and all(len(set(own)) == 1 for own in judged),
        failures=failures_of(runs),
    )


headroom = sync_function(aheadroom)
"""Measure before a run whether there is something to gain: the synchronous version of `aheadroom`."""
