"""From proposals to the one lasting mutation: merge, check types, ask the gate, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.agents.parameters import read, write
from aggregator.checks import is_finite
from aggregator.errors import ConfigError
from aggregator.protocols import Gate, UpdateRule
from aggregator.records import Decision, Failure, Proposal, Rollout, Stage, Values
from aggregator.training.context import current_step
from aggregator.training.evaluation import mean
from aggregator.training.parts import decided, merged
from aggregator.training.suggestions import typed


class Update(Struct, frozen=True, kw_only=True):
    """What one update came to: the values that were proposed, the gate's verdict, the batch's mean score."""

    values: Values = {}
    decision: Decision
    score: float | None = None
    reasoning: str = ""
    proposals: int = 0
    contributors: tuple[int, ...] = ()
    failures: tuple[Failure, ...] = ()


async def apply(proposals: Sequence[Proposal], rule: UpdateRule, gate: Gate, parameters: Sequence[Any]) -> Update:
    """Merge the proposals, check the result against each parameter's own type, ask the gate, and write it."""
    step = current_step()
    before = read(parameters)
    agreed = settle(await merged(rule, before, proposals, stepsize=step.stepsize))
    checked, refused = typed(agreed.values, parameters)
    values = {name: value for name, value in checked.items() if value != before[name]}
    decision = Decision(accepted=False, reason="no change was proposed")
    if values:
        decision = await decided(gate, before, {**before, **values}, step.samples)
    if decision.accepted:
        write(parameters, values)
    return Update(
        values=values,
        decision=decision,
        score=mean([proposal.score for proposal in proposals]),
        reasoning=agreed.reasoning,
        proposals=sum(bool(proposal.values) for proposal in proposals),
        contributors=agreed.sample_ids if values else (),
        failures=agreed.failures or unread("aggregation", agreed.error, None, *refused.values()),
    )


def unread(stage: Stage, error: str | None, sample_id: int | None, *more: str) -> tuple[Failure, ...]:
    """Return what could not be read or converted as failures of this stage."""
    messages = [message for message in (error, *more) if message]
    return tuple(
        Failure(stage=stage, error="SuggestionError", message=message, sample_id=sample_id) for message in messages
    )


def as_proposal(output: Any) -> Proposal:
    """Read what `forward` returned: a Proposal, {parameter or name: value}, or (such a mapping, score)."""
    score = None
    if isinstance(output, tuple) and len(output) == 2:
        output, score = output
        if score is not None and not is_finite(score):
            raise ConfigError(f"expected (mapping, score) from forward, the score a finite number, got {score!r}")
    if isinstance(output, Proposal):
        return output
    if isinstance(output, Rollout):
        return Proposal(score=output.score, feedback=output.feedback, sample_ids=(output.sample_id,))
    if output is None:
        return Proposal(score=score)
    if isinstance(output, Mapping):
        return Proposal(values={str(getattr(key, "name", key)): value for key, value in output.items()}, score=score)
    raise ConfigError(
        f"expected forward to return a Proposal, a mapping of parameter to value, or (mapping, score), got {output!r}"
    )


def score_of(output: Any) -> float | None:
    """Return the score in what `forward` returned; None where it is none, which `as_proposal` tells of."""
    score = output[1] if isinstance(output, tuple) and len(output) == 2 else getattr(output, "score", None)
    return score if is_finite(score) else None


def settle(merged: Sequence[Proposal]) -> Proposal:
    """Return the one proposal that a rule left; raises ConfigError where several contradict each other."""
    if not merged:
        return Proposal()
    names = [name for proposal in merged for name in proposal.values]
    if len(names) != len(set(names)):
        raise ConfigError(
            f"the rule left {len(merged)} proposals for the same parameter; end it with one that merges, "
            "as in chain(top_k(8), LLMMerge(llm))"
        )
    values = {name: value for proposal in merged for name, value in proposal.values.items()}
    failures = tuple(record for proposal in merged for record in proposal.failures)
    samples = tuple(sorted({i for proposal in merged for i in proposal.sample_ids if proposal.values}))
    return replace(merged[0], values=values, failures=failures, sample_ids=samples)
