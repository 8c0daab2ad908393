"""The decisions of training, each a Protocol with its own method; a part of your own has that method.

Each takes the `Step`, which is all that it may know of the run. The other extension points, which know nothing of
training, are in `aggregator.protocols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from aggregator.agents.parameters import ParameterNode
from aggregator.records import Candidate, Decision, Proposal, Rollout, Sample, Values
from aggregator.training.step import Step


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
