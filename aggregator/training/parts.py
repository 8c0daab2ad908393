"""What users plug into a trainer is looked at when they do, before the first call is paid; so is what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import isawaitable
from typing import Any, TypeVar

from msgspec.structs import replace

from aggregator.checks import accepts
from aggregator.errors import ConfigError
from aggregator.llm.budget import Budget
from aggregator.observing.observer import as_observers, from_logger
from aggregator.protocols import Gate, UpdateRule
from aggregator.records import Decision, Proposal, Rollout, Sample, StepReport, Values
from aggregator.text import shorten
from aggregator.training.suggestions import typed

Propose = TypeVar("Propose", bound=Callable[..., Any])

_OPTIMIZER = "an optimizer such as LLMOptimizer(llm=llm), or one with async propose(rollout, parameters, *, history)"


def check_rule(rule: Any) -> None:
    """Raise ConfigError for what cannot be called as a rule is, as `top_k` without its number."""
    if not accepts(rule, {}, (), stepsize=0.5):
        raise ConfigError(
            f"Expected a rule, async (current, proposals, *, stepsize) -> proposals, such as top_k(8), got {rule!r}"
        )


def check_gate(gate: Any) -> None:
    """Raise ConfigError for what cannot be called as a gate is, as `improves_on_batch` without its brackets."""
    if not accepts(gate, {}, {}, ()):
        raise ConfigError(
            f"Expected a gate, async (before, after, batch) -> Decision, such as improves_on_batch(), got {gate!r}"
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise ConfigError for what cannot propose: the agent would run on every instance for nothing."""
    if isinstance(optimizer, type) or not accepts(getattr(optimizer, "propose", None), None, (), history=()):
        raise ConfigError(f"Expected {_OPTIMIZER}, got {optimizer!r}")


def check_guide(guide: Any) -> None:
    """Raise ConfigError for what cannot judge: the agent would run on every instance for nothing."""
    if not accepts(getattr(guide, "get_feedback", guide), None, None, None):
        raise ConfigError(
            f"expected a guide: a callable (x, output, info) -> score or (score, feedback), got {guide!r}"
        )


def check_watchers(logger: Any, observers: Any) -> None:
    """Raise ConfigError for what cannot be told of a step: it would show after the first one was paid."""
    if logger is not None:
        from_logger(logger)
    if observers is not None:
        as_observers(observers)


def check_budget(budget: Any) -> None:
    """Raise ConfigError for what counts nothing: it lost every call that was to be counted."""
    if budget is not None and not isinstance(budget, Budget):
        raise ConfigError(f"Expected budget=Budget(usd=..., tokens=..., calls=...), got {budget!r}")


def gives_typed(propose: Propose) -> Propose:
    """Mark a `propose` that gives every value in its parameter's own type, so that none is converted once more.

    The mark is the function's, so whoever overrides it is looked at.
    """
    propose.__gives_typed__ = True  # type: ignore[attr-defined]
    return propose


async def proposed(optimizer: Any, seen: Rollout, parameters: Sequence[Any], history: Sequence[StepReport]) -> Proposal:
    """Return what an optimizer proposes, each value in its parameter's own type; `error` says what does not fit.

    Score and feedback are those of the rollout where the optimizer gives none of its own.
    """
    answer = optimizer.propose(seen, parameters, history=history)
    proposal = await _awaitable(answer, "propose", optimizer)
    if not isinstance(proposal, Proposal) or not isinstance(proposal.values, dict):
        raise TypeError(
            f"Expected a Proposal(values={{...}}) from {name_of(optimizer)}.propose, got {shorten(proposal)}"
        )
    if not getattr(optimizer.propose, "__gives_typed__", False):
        proposal = fitted(proposal, parameters)
    score = proposal.score
    return replace(
        proposal,
        score=seen.score if score is None or not math.isfinite(score) else score,
        feedback=proposal.feedback or seen.feedback,
        sample_ids=proposal.sample_ids or (seen.sample_id,),
    )


def fitted(proposal: Proposal, parameters: Sequence[Any]) -> Proposal:
    """Return the proposal with each value in its parameter's own type; `error` says what does not fit."""
    values, refused = typed(proposal.values, parameters)
    error = "; ".join(reason for reason in (proposal.error, *refused.values()) if reason) or None
    return replace(proposal, values=values, error=error)


async def merged(
    rule: UpdateRule, current: Values, proposals: Sequence[Proposal], *, stepsize: float
) -> Sequence[Proposal]:
    """Return what a rule makes of proposals; raises ConfigError for anything but proposals."""
    answer: Any = await _awaitable(rule(current, proposals, stepsize=stepsize), "the rule", rule)
    if not isinstance(answer, Sequence) or not all(isinstance(proposal, Proposal) for proposal in answer):
        raise ConfigError(
            f"Expected a list of Proposals from the rule {name_of(rule)}, got {shorten(answer)}; [] is no update"
        )
    return answer


async def decided(gate: Gate, before: Values, after: Values, batch: Sequence[Sample]) -> Decision:
    """Return a gate's verdict; raises ConfigError for anything but a Decision."""
    answer: Any = await _awaitable(gate(before, after, batch), "the gate", gate)
    if not isinstance(answer, Decision):
        raise ConfigError(
            f"Expected a Decision(accepted=..., reason=...) from the gate {name_of(gate)}, got {shorten(answer)}"
        )
    return answer


async def _awaitable(answer: Any, what: str, part: Any) -> Any:
    if not isawaitable(answer):
        raise ConfigError(
            f"Expected {what} of {name_of(part)} to be async, got {shorten(answer)} at once; write `async def`"
        )
    return await answer


def name_of(part: Any) -> str:
    """Return a part's name, its class's if it is an object; "" for None."""
    return "" if part is None else getattr(part, "__qualname__", type(part).__qualname__)
