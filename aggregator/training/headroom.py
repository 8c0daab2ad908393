"""Headroom: is there anything to gain? A few repeated rollouts before a run is paid for.

Of 72 runs of prompt optimizers 49 % ended below their start (arXiv 2604.14585), which proposes such a test: where an
agent is always right or always wrong on an instance, better words seldom help; where it is sometimes right, they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from statistics import fmean, pstdev
from typing import Any

from msgspec import Struct

from aggregator.adapters.agents import as_agent
from aggregator.agents.parameters import read
from aggregator.cassettes.lineage import lineage
from aggregator.checks import check_positive, is_finite
from aggregator.errors import ConfigError
from aggregator.executors.work import root_of
from aggregator.guides.calling import check_guide
from aggregator.portal import call
from aggregator.records import Failure, Rollout
from aggregator.training.batches import Dataset, samples
from aggregator.training.evaluation import Evaluations, alone, failures_of


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
        """What the figures mean for a run, in a sentence."""
        if self.score is None:
            return "No instance was judged; look at the failures first."
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
) -> Headroom:
    """Run the agent `repeats` times on `sample` instances, drawn by `seed` (None: on all), and return what they show.

    `max_score` is the best score; by default what the guide declares as `guide.max_score`, never what was seen. An
    instance on which the agent fails scores `min_score`, or the guide's declared `min_score`; without either it is not
    judged. Raises ConfigError for invalid arguments, and what ends a run.
    """
    check_guide(guide)
    check_positive("repeats", repeats)
    if repeats < 2:
        raise ConfigError(f"Expected repeats of at least 2, to see whether rollouts differ, got {repeats}")
    best = getattr(guide, "max_score", None) if max_score is None else max_score
    worst = getattr(guide, "min_score", None) if min_score is None else min_score
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
    with lineage("headroom"):
        try:
            runs = await evaluate(read(parameters), found, repeats=repeats, fresh=True)
        except BaseExceptionGroup as group:
            raise root_of(group) from None
    return summarise(runs, repeats, best)


def summarise(runs: Sequence[Rollout], repeats: int, max_score: float | None = None) -> Headroom:
    """Return the figures of rollouts that come instance by instance, `repeats` of each.

    >>> from aggregator.records import Rollout
    >>> runs = [Rollout(sample_id=i // 2, score=score) for i, score in enumerate([1.0, 0.0, 1.0, 1.0])]
    >>> found = summarise(runs, 2, 1.0)
    >>> found.score, found.undecided, found.perfect
    (0.75, 0.5, 0.5)
    """
    groups = [runs[i : i + repeats] for i in range(0, len(runs), repeats)]
    scores = [[run.score for run in group if run.score is not None] for group in groups]
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


def headroom(
    agent: Any,
    guide: Any,
    data: Dataset,
    *,
    repeats: int = 4,
    sample: int | None = 16,
    max_score: float | None = None,
    min_score: float | None = None,
    seed: int = 0,
) -> Headroom:
    """Tell before a run whether there is something to gain: the synchronous face of `aheadroom`.

    >>> def guess(x, *, offset=0):
    ...     return x + offset
    >>> print(headroom(guess, lambda x, output, info: float(output == info), [(1, 1), (2, 3)], max_score=1).verdict)
    The repeats are identical, because of a seed, a temperature of 0 or a cache: they show no spread.
    """
    return call(
        aheadroom,
        agent,
        guide,
        data,
        repeats=repeats,
        sample=sample,
        max_score=max_score,
        min_score=min_score,
        seed=seed,
    )
