"""What users plug into a trainer is looked at when they do, before the first call is paid."""

from __future__ import annotations

from inspect import signature
from typing import Any

from aggregator.errors import ConfigError

_OPTIMIZER = "an optimizer such as LLMOptimizer(llm=llm), or one with async propose(rollout, parameters, *, history)"


def check_rule(rule: Any) -> None:
    """Raise ConfigError for what cannot be called as a rule is, as `top_k` without its number."""
    if not _takes(rule, {}, (), stepsize=0.5):
        raise ConfigError(
            f"Expected a rule, async (current, proposals, *, stepsize) -> proposals, such as top_k(8), got {rule!r}"
        )


def check_gate(gate: Any) -> None:
    """Raise ConfigError for what cannot be called as a gate is, as `improves_on_batch` without its brackets."""
    if not _takes(gate, {}, {}, ()):
        raise ConfigError(
            f"Expected a gate, async (before, after, batch) -> Decision, such as improves_on_batch(), got {gate!r}"
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise ConfigError for what cannot propose: the agent would run on every instance for nothing."""
    if isinstance(optimizer, type) or not callable(getattr(optimizer, "propose", None)):
        raise ConfigError(f"Expected {_OPTIMIZER}, got {optimizer!r}")


def _takes(part: Any, *arguments: Any, **options: Any) -> bool:
    """Say whether something can be called with such arguments."""
    if isinstance(part, type) or not callable(part):
        return False
    try:
        expected = signature(part, follow_wrapped=False)
    except ValueError:  # written in C: nothing is known of it
        return True
    try:
        expected.bind(*arguments, **options)
    except TypeError:
        return False
    return True
