"""Step: all that a part may know of the step it serves, as an argument.

A rule, gate, check, optimizer or search that is called with `Step.of(agent)`, in a test or a notebook, does exactly
what it does inside a run. The Protocols here are the decisions of training; each takes the step as its last argument.
Extension points that do not depend on training are in `aggregator.protocols`.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from aggregator.adapters.agents import as_agent
from aggregator.agents.parameters import ParameterNode, lay_over, read
from aggregator.errors import ConfigError
from aggregator.guides.calling import declared_limit
from aggregator.records import Candidate, Decision, Proposal, Rollout, Sample, StepReport, Values
from aggregator.training.batches import Dataset
from aggregator.training.batches import samples as read_samples
from aggregator.training.evaluation import Evaluate, Evaluations, alone
from aggregator.training.schedules import check_stepsize


class Step(Struct, frozen=True, kw_only=True):
    """One step as its parts see it.

    `number` counts the steps of the run from 0, `epoch` its epochs. `stepsize` in [0, 1] is how much proposals weigh
    against the current value. `values` are the current values by parameter name; where a search explores several
    candidates, an optimizer and a rule see those of their candidate. `parameters` are the ParameterNodes that may
    change. `training` is the training set of the run, `samples` the minibatch, `rollouts` what the agent did with it
    under `values`, in the same order; an optimizer sees the instances that it proposes for, and `batch_size` is how
    many the minibatch has. `history` holds the reports of earlier steps, `initial` the values that the run began with.
    `min_score` is the score of an instance on which the agent itself fails. `checks` refuse single values
    (`aggregator.training.checks`).

    An instance whose score is at least `skip_from` is satisfied: nothing is proposed for it. A rule sees in `satisfied`
    how many of these are in the group that it merges: they are support for the current value.


    `memory` is JSON that a gate may write, under its own names; it is saved with the step, and dropped with a step
    that fails. For all other parts it is read-only.
    """

    number: int = 0
    epoch: int = 0
    stepsize: float = 0.5
    seed: int = 0
    min_score: float | None = None
    values: Values = {}
    parameters: Sequence[ParameterNode[Any]] = ()
    training: Sequence[Sample] = ()
    samples: Sequence[Sample] = ()
    rollouts: Sequence[Rollout] = ()
    batch_size: int = 1
    history: Sequence[StepReport] = ()
    initial: Values = {}
    checks: Sequence[Any] = ()
    skip_from: float | None = None
    satisfied: int = 0
    memory: MutableMapping[str, Any] = {}
    evaluator: Evaluate | None = None

    def __repr__(self) -> str:
        names = ", ".join(parameter.name for parameter in self.parameters)
        return f"<Step {self.number} of epoch {self.epoch}: {len(self.samples)} samples, parameters {names}>"

    @classmethod
    def of(
        cls,
        agent: Any,
        *,
        guide: Any = None,
        samples: Dataset | Sequence[Sample] = (),
        stepsize: float = 0.5,
        checks: Sequence[Any] = (),
    ) -> Step:
        """Return a step of an agent by itself, for a test or a notebook.

        `samples` is a data set as for `train`. With a guide, `evaluate` runs the agent. Raises ConfigError for what is
        no agent, data set or stepsize.

        >>> from aggregator.portal import call
        >>> from aggregator.training.rules import majority
        >>> def add(x, *, amount=1):
        ...     return x + amount
        >>> from aggregator.records import Proposal
        >>> call(majority, [Proposal(values={"amount": k}) for k in (3, 5, 5)], Step.of(add))[0].values
        {'amount': 5}
        """
        known = as_agent(agent)
        parameters = [parameter for parameter in known.parameters() if getattr(parameter, "trainable", True)]
        given: Any = samples
        if not isinstance(given, Sequence) or not all(isinstance(sample, Sample) for sample in given):
            given = read_samples(given, name="samples")
        lowest = None if guide is None else declared_limit(guide, "min_score")
        return cls(
            stepsize=check_stepsize(stepsize),
            values=read(parameters),  # type: ignore[arg-type]
            initial=read(parameters),  # type: ignore[arg-type]
            checks=checks,
            parameters=parameters,  # type: ignore[arg-type]
            samples=tuple(given),
            batch_size=len(given),
            min_score=lowest,
            evaluator=None if guide is None else Evaluations(alone(known), guide, parameters, min_score=lowest).at(0),
        )

    async def evaluate(
        self,
        values: Values,
        samples: Sequence[Sample],
        *,
        guide: Any = None,
        repeats: int | None = None,
        fresh: bool = False,
    ) -> Sequence[Rollout]:
        """Return one rollout per sample under given values; with `repeats` so many of each, sample by sample.

        Without `repeats`, in a run that repeats its rollouts, the score of a sample is the mean of as many.
        `values` may leave parameters out, which keep those of the step. `guide` judges instead of the run's. A score is
        paid once: what was evaluated before comes back with its scores and failure only, unless `fresh`. Nothing is
        changed in the agent. Raises ConfigError for a step without a guide, and what ends a run.
        """
        if self.evaluator is None:
            raise ConfigError(
                "Expected a step that can run the agent, got one without a guide; give it as in "
                "Step.of(agent, guide=guide, samples=samples)"
            )
        return await self.evaluator({**self.values, **values}, samples, guide=guide, repeats=repeats, fresh=fresh)


def read_only(step: Step) -> Step:
    """Return the step for a part that may not write its memory."""
    return replace(step, memory=MappingProxyType(step.memory))


def use_values(step: Step) -> AbstractContextManager[None]:
    """Let the parameters read as the step's values inside; what is assigned to them there ends with the block."""
    return lay_over({parameter: step.values[parameter.name] for parameter in step.parameters})


class Optimizer(Protocol):
    """Proposes new values."""

    async def propose(self, rollouts: Sequence[Rollout], step: Step, /) -> Proposal:
        """Return what the rollouts call for: one instance's, or those of a whole minibatch.

        `step.parameters` may change, `step.values` are the values that the rollouts ran with.
        """
        ...


class TraceOptimizer(Protocol):
    """An optimizer of Trace's, taken as it is."""

    def zero_feedback(self) -> Any:
        """Forget the feedback of the step before."""
        ...

    def step(self) -> Any:
        """Update the parameters."""
        ...


AnyOptimizer = Optimizer | TraceOptimizer
"""What a trainer takes as an optimizer."""


class UpdateRule(Protocol):
    """Merges proposals. Closed: what one rule returns, another can take."""

    async def __call__(self, proposals: Sequence[Proposal], step: Step, /) -> Sequence[Proposal]:
        """Return fewer proposals than came, or better ones, for `step.values` at `step.stepsize`."""
        ...


class Gate(Protocol):
    """Accepts or refuses an update."""

    async def __call__(self, before: Values, after: Values, step: Step, /) -> Decision:
        """Compare the values before and after, on `step.samples` or whatever the gate looks at."""
        ...


class Check(Protocol):
    """Refuses a single value by what it is, before anything is run."""

    def __call__(self, before: Any, after: Any, parameter: ParameterNode[Any], step: Step, /) -> str | None:
        """Return the reason to refuse a new value of a parameter, or None."""
        ...


class Search(Protocol):
    """Decides which candidates are explored, tried, made current and remembered.

    A step runs the minibatch under each explored candidate and makes `proposals` new ones of each. `explored` and
    `pool` begin with the current candidate. `guide`, if it has one, judges the trials instead of the run's guide.
    """

    proposals: int

    def explore(self, pool: Sequence[Candidate], step: Step, /) -> Sequence[Candidate]:
        """Return the candidates to explore, of the pool or made of it; the current one is always explored."""
        ...

    def trials(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step, /
    ) -> Sequence[tuple[Candidate, Sequence[Sample]]]:
        """Return what to try on which samples; a score on them is added to the candidate.

        What the minibatch has shown of an explored candidate costs nothing: ask for `step.samples`.
        """
        ...

    def choose(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step, /
    ) -> tuple[Candidate | None, Decision]:
        """Return the candidate that should become current, or the best refused one, or None; and the decision."""
        ...

    def keep(self, pool: Sequence[Candidate], step: Step, /) -> Sequence[Candidate]:
        """Return what is remembered of all candidates; the current one is always kept."""
        ...
