"""The seed's hooks, `forward(agent, x, guide, info)` and `update(outputs)`, whose signatures carry no step.

This is the one place where a step travels in a context variable: it is set around a hook that a user has overridden,
for `super().forward(...)` and `super().update(...)` inside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import isawaitable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.checks import is_async, is_finite
from aggregator.errors import ConfigError
from aggregator.guides.calling import Call
from aggregator.records import Failure, Proposal, Rollout, Sample
from aggregator.text import shorten
from aggregator.training.step import Step


class Place(Struct, frozen=True, kw_only=True):
    """Where a hook runs: the step, how synchronous code is called, and how outputs are applied.

    `seen` gathers the rollouts that `super().forward` made for this instance.
    """

    step: Step
    call: Call
    seen: list[Rollout] = []
    update: Callable[[Sequence[Any]], Awaitable[Any]] | None = None


_place: ContextVar[Place | None] = ContextVar("aggregator_seed_place", default=None)

current_place = _place.get
"""Return where the present hook runs; None outside of a run."""


@contextmanager
def at_place(place: Place) -> Iterator[None]:
    """Run the hook inside at a place."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


async def call_hook(hook: Callable[..., Any], call: Call, *arguments: Any) -> Any:
    """Return what an overridden hook returns: awaited if it is async, run in a thread if it is not."""
    if is_async(hook):
        return await hook(*arguments)
    answer = await call(hook, *arguments)
    return await answer if isawaitable(answer) else answer


class Hooks(Struct, frozen=True, kw_only=True):
    """The overridden `forward` and `update` of a trainer; None if it is the library's own."""

    forward: Callable[..., Any] | None = None
    update: Callable[..., Any] | None = None


class Instance(Struct, frozen=True, kw_only=True, gc=False):  # nothing in it refers to it
    """What a step knows of one sample under one candidate.

    `output` is what `forward` returned, for an overridden `update`; `rollout` has at least its score. `is_observed` is
    False if the rollout says nothing of the agent: `forward` proposed by itself, or was lost.
    """

    sample: Sample
    rollout: Rollout
    proposal: Proposal
    output: Any = None
    is_observed: bool = True


def make_instance(sample: Sample, rollout: Rollout, proposal: Proposal | None = None) -> Instance:
    """Return the instance of a rollout, and of the proposal made for it if there is one."""
    output = rollout if proposal is None else proposal
    return Instance(sample=sample, rollout=rollout, proposal=proposal or propose_nothing(rollout), output=output)


def propose_nothing(rollout: Rollout) -> Proposal:
    """Return the proposal of an instance that asks for no change: its score, feedback and failure."""
    return Proposal(
        score=rollout.score, feedback=rollout.feedback, failures=rollout.failures, sample_ids=(rollout.sample_id,)
    )


def is_satisfied(rollout: Rollout, step: Step) -> bool:
    """Return True if an instance reached the score from which nothing is proposed for it.

    >>> perfect = Rollout(sample_id=0, score=1.0)
    >>> is_satisfied(perfect, Step(skip_from=1.0)), is_satisfied(perfect, Step())
    (True, False)
    """
    reached = step.skip_from is not None and rollout.score is not None and rollout.score >= step.skip_from
    return reached and rollout.failure is None


def lose_instance(sample: Sample, record: Failure, lineage: str = "") -> Instance:
    """Return the instance of a sample that an error lost."""
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
    """Read what `forward` returned: a Rollout, a Proposal, {parameter or name: value}, or (that, score).

    `seen` are the rollouts that `super().forward` made on the way. Raises ConfigError for anything else, unless an
    `update` of the user's own reads it (`strict=False`).
    """
    try:
        proposal = _as_proposal(output, {id(one.origin): one.name for one in parameters if hasattr(one, "origin")})
    except ConfigError:
        if strict:
            raise
        score = output[1] if isinstance(output, tuple) and len(output) == 2 else getattr(output, "score", None)
        proposal = Proposal(score=score if is_finite(score) else None)
    if sample is None:  # an output that `update` is given by itself
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
    """Read a proposal; `names` are those of parameters whose originals, such as nodes of Trace, have other ones."""
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
