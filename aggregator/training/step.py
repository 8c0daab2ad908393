"""Step: the step as an argument, with everything that a part may know of it.

A rule, gate, check, optimizer or search that is called with `Step.of(agent)`, in a test or a notebook, does exactly
what it does inside a run. The Protocols here are the decisions of training; each takes the step as its last argument.
Extension points that do not depend on training are in `aggregator.protocols`.

The seed's hooks, `forward(agent, x, guide, info)` and `update(outputs)`, have no argument for a step. For them only
there is a context variable: it is set around an overridden hook, for `super().forward(...)` and `super().update(...)`
inside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from inspect import isawaitable
from types import MappingProxyType
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from aggregator.adapters.agents import as_agent
from aggregator.agents.parameters import ParameterNode, lay_over, read
from aggregator.checks import is_async, is_finite
from aggregator.errors import ConfigError
from aggregator.guides.calling import Call, declared_limit
from aggregator.records import Candidate, Decision, Failure, Proposal, Rollout, Sample, StepReport, Values
from aggregator.text import shorten
from aggregator.training.batches import Dataset
from aggregator.training.batches import samples as read_samples
from aggregator.training.evaluation import Evaluate, Evaluations, alone
from aggregator.training.schedules import check_stepsize


class Step(Struct, frozen=True, kw_only=True):
    """One step as its parts see it.

    `number` counts the steps of the run from 0, `epoch` its epochs. `stepsize` in [0, 1] is the weight of the proposals
    against the current value. `values` are the current values by parameter name; if a search explores several
    candidates, an optimizer and a rule see those of their candidate. `parameters` are the ParameterNodes that may
    change. `training` is the training set of the run, `samples` the minibatch, `rollouts` its rollouts with `values`,
    in the same order; an optimizer sees the instances that it proposes for, and `batch_size` is the size of the
    minibatch. `history` holds the reports of earlier steps, `initial` the run's initial values. `min_score` is the
    score of an instance on which the agent itself fails. `checks` refuse single values (`aggregator.training.gates`).

    An instance whose score is at least `skip_from` is satisfied: nothing is proposed for it. For a rule, `satisfied` is
    the number of these in the group that it merges: they support the current value.

    `memory` is JSON that a gate may write, under its own names; it is saved with the step, and dropped with a step that
    fails. For all other parts it is read-only.
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
        """Return a step of an agent outside a run, for a test or a notebook.

        `samples` is a data set as for `train`. With a guide, `evaluate` runs the agent. Raises ConfigError for an
        invalid agent, data set or stepsize.

        >>> from aggregator.portal import call
        >>> from aggregator.training.merge import majority
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
        """Return one rollout per sample with the given values; with `repeats` that many of each, sample by sample.

        Without `repeats`, in a run that repeats its rollouts, the score of a sample is the mean of as many. `values`
        may leave parameters out, which keep the step's. `guide` judges instead of the run's. A score is paid for once:
        an earlier evaluation is returned with its scores and failure only, unless `fresh`. The agent is not changed.
        Raises ConfigError for a step without a guide, and what ends a run.
        """
        if self.evaluator is None:
            raise ConfigError(
                "Expected a step that can run the agent, got one without a guide; give it as in "
                "Step.of(agent, guide=guide, samples=samples)"
            )
        return await self.evaluator({**self.values, **values}, samples, guide=guide, repeats=repeats, fresh=fresh)


def read_only(step: Step) -> Step:
    """Return the step for a part that may not write to its memory."""
    return replace(step, memory=MappingProxyType(step.memory))


def use_values(step: Step) -> AbstractContextManager[None]:
    """Set the parameters to the step's values inside the block; assignments inside it end with the block."""
    return lay_over({parameter: step.values[parameter.name] for parameter in step.parameters})


class Optimizer(Protocol):
    """Proposes new values."""

    async def propose(self, rollouts: Sequence[Rollout], step: Step, /) -> Proposal:
        """Return the proposal for the rollouts of one instance, or of a whole minibatch.

        `step.parameters` may change, `step.values` are the values of the rollouts.
        """
        ...


class TraceOptimizer(Protocol):
    """A Trace optimizer, used unchanged."""

    def zero_feedback(self) -> Any:
        """Discard the previous step's feedback."""
        ...

    def step(self) -> Any:
        """Update the parameters."""
        ...


AnyOptimizer = Optimizer | TraceOptimizer
"""What a trainer accepts as an optimizer."""


class UpdateRule(Protocol):
    """Merges proposals. Closed: one rule accepts another's result."""

    async def __call__(self, proposals: Sequence[Proposal], step: Step, /) -> Sequence[Proposal]:
        """Return fewer or better proposals, for `step.values` at `step.stepsize`."""
        ...


class Gate(Protocol):
    """Accepts or refuses an update."""

    async def __call__(self, before: Values, after: Values, step: Step, /) -> Decision:
        """Compare the values before and after, on `step.samples` or the gate's own data."""
        ...


class Check(Protocol):
    """Refuses a single value before anything is run."""

    def __call__(self, before: Any, after: Any, parameter: ParameterNode[Any], step: Step, /) -> str | None:
        """Return the reason to refuse a new value of a parameter, or None."""
        ...


class Search(Protocol):
    """Decides which candidates are explored, tried, made current and remembered.

    A step runs the minibatch with each explored candidate and makes `proposals` new ones of each. `explored` and `pool`
    begin with the current candidate. `guide`, if it has one, judges the trials instead of the run's guide.
    """

    proposals: int

    def explore(self, pool: Sequence[Candidate], step: Step, /) -> Sequence[Candidate]:
        """Return the candidates to explore, from the pool or new ones; the current one is always explored."""
        ...

    def trials(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step, /
    ) -> Sequence[tuple[Candidate, Sequence[Sample]]]:
        """Return the candidates to try, and the samples for each; their scores are added to the candidate.

        An explored candidate's scores on the minibatch cost nothing: return `step.samples`.
        """
        ...

    def choose(
        self, explored: Sequence[Candidate], made: Sequence[Candidate], step: Step, /
    ) -> tuple[Candidate | None, Decision]:
        """Return the candidate that should become current, or the best refused one, or None; and the decision."""
        ...

    def keep(self, pool: Sequence[Candidate], step: Step, /) -> Sequence[Candidate]:
        """Return the candidates to remember; the current one is always kept."""
        ...


# ---- the seed's hooks, whose signatures have no step


class Place(Struct, frozen=True, kw_only=True):
    """A hook's surroundings: the step, how synchronous code is called, and how outputs are applied.

    `seen` gathers the rollouts that `super().forward` made for this instance.
    """

    step: Step
    call: Call
    seen: list[Rollout] = []
    update: Callable[[Sequence[Any]], Awaitable[Any]] | None = None


_place: ContextVar[Place | None] = ContextVar("aggregator_seed_place", default=None)

current_place = _place.get
"""Returns the current hook's place; None outside a run."""


@contextmanager
def at_place(place: Place) -> Iterator[None]:
    """Run the hook inside at a place."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


async def call_hook(hook: Callable[..., Any], call: Call, *arguments: Any) -> Any:
    """Return the result of an overridden hook: awaited if it is async, run in a thread if it is not."""
    if is_async(hook):
        return await hook(*arguments)
    answer = await call(hook, *arguments)
    return await answer if isawaitable(answer) else answer


class Hooks(Struct, frozen=True, kw_only=True):
    """The overridden `forward` and `update` of a trainer; None if it is the library's own."""

    forward: Callable[..., Any] | None = None
    update: Callable[..., Any] | None = None


class Instance(Struct, frozen=True, kw_only=True, gc=False):  # nothing in it refers to it
    """A sample's result with one candidate in a step.

    `output` is what `forward` returned, for an overridden `update`; `rollout` has at least its score. `is_observed` is
    False if there is no rollout of the agent: `forward` proposed by itself, or was lost.
    """

    sample: Sample
    rollout: Rollout
    proposal: Proposal
    output: Any = None
    is_observed: bool = True


def make_instance(sample: Sample, rollout: Rollout, proposal: Proposal | None = None) -> Instance:
    """Return the instance of a rollout, and of its proposal if there is one."""
    output = rollout if proposal is None else proposal
    return Instance(sample=sample, rollout=rollout, proposal=proposal or propose_nothing(rollout), output=output)


def propose_nothing(rollout: Rollout) -> Proposal:
    """Return the empty proposal of an instance: its score, feedback and failure."""
    return Proposal(
        score=rollout.score, feedback=rollout.feedback, failures=rollout.failures, sample_ids=(rollout.sample_id,)
    )


def is_satisfied(rollout: Rollout, step: Step) -> bool:
    """Return True if an instance reached the score from which it gets no proposal.

    >>> perfect = Rollout(sample_id=0, score=1.0)
    >>> is_satisfied(perfect, Step(skip_from=1.0)), is_satisfied(perfect, Step())
    (True, False)
    """
    reached = step.skip_from is not None and rollout.score is not None and rollout.score >= step.skip_from
    return reached and rollout.failure is None


def lose_instance(sample: Sample, record: Failure, lineage: str = "") -> Instance:
    """Return the lost instance of a sample, with its error."""
    proposal = Proposal(error=f"{record.error}: {record.message}", failures=(record,), sample_ids=(sample.id,))
    rollout = Rollout(sample_id=sample.id, x=sample.x, failure=record, lineage=lineage)
    return Instance(sample=sample, rollout=rollout, proposal=proposal, output=proposal, is_observed=False)


def read_output(
    output: Any,
    sample: Sample | None = None,
    *,
    seen: Sequence[Rollout] = (),
    lineage: str = "",
    strict: bool = True,
    parameters: Sequence[Any] = (),
) -> Instance:
    """Read the result of `forward`: a Rollout, a Proposal, {parameter or name: value}, or (that, score).

    `seen` are the rollouts of `super().forward`. Raises ConfigError for anything else, unless an overridden `update`
    reads it (`strict=False`).
    """
    try:
        proposal = _as_proposal(output, {id(one.origin): one.name for one in parameters if hasattr(one, "origin")})
    except ConfigError:
        if strict:
            raise
        score = output[1] if isinstance(output, tuple) and len(output) == 2 else getattr(output, "score", None)
        proposal = Proposal(score=score if is_finite(score) else None)
    if sample is None:  # an output that the user passes to `update`
        sample = Sample(proposal.sample_ids[0] if proposal.sample_ids else 0, None)
    elif not isinstance(output, Rollout):
        proposal = replace(proposal, sample_ids=(sample.id,))
    if isinstance(output, Rollout):
        return Instance(sample=sample, rollout=output, proposal=proposal, output=output)
    facts: dict[str, Any] = {"sample_id": sample.id, "x": sample.x, "feedback": proposal.feedback, "lineage": lineage}
    return Instance(
        sample=sample,
        rollout=replace(seen[-1], score=proposal.score) if seen else Rollout(score=proposal.score, **facts),
        proposal=proposal,
        output=proposal if isinstance(output, Proposal) else output,
        is_observed=bool(seen),
    )


def _as_proposal(output: Any, names: Mapping[int, str]) -> Proposal:
    """Read a proposal; `names` are those of parameters whose originals, such as Trace nodes, have other names."""
    score = None
    if isinstance(output, tuple) and len(output) == 2:
        output, score = output
        if score is not None and not is_finite(score):
            raise ConfigError(f"Expected (mapping, score) from forward, the score a finite number, got {score!r}")
    if isinstance(output, Proposal):
        return output
    if isinstance(output, Rollout):
        return propose_nothing(output)
    if output is None:
        return Proposal(score=score)
    if isinstance(output, Mapping):
        named = {names.get(id(key)) or str(getattr(key, "name", key)): value for key, value in output.items()}
        return Proposal(values=named, score=score)
    raise ConfigError(
        "Expected forward to return a Proposal, a mapping of parameter to value, or (mapping, score), "
        f"got {shorten(output)}"
    )
