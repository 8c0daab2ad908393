"""What the calls of one context cost, by role.

A ledger counts every call made inside `collecting()`, whatever task or thread makes it; inner ledgers also count in
the outer ones. Totals do not depend on the order in which calls finish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import fsum

from aggregator.records import Usage

_current: ContextVar[Ledger | None] = ContextVar("aggregator_ledger", default=None)


class Ledger:
    """Usage by role of the calls made in one context."""

    def __init__(self, outer: Ledger | None = None) -> None:
        self._entries: dict[str, list[Usage]] = {}
        self._outer = outer

    def add(self, role: str, usage: Usage) -> None:
        """Count one call."""
        self._entries.setdefault(role, []).append(usage)
        if self._outer is not None:
            self._outer.add(role, usage)

    def totals(self) -> dict[str, Usage]:
        """Return the sum per role, roles in alphabetical order."""
        return {role: total(self._entries[role]) for role in sorted(self._entries)}


def total(usages: Iterable[Usage]) -> Usage:
    """Add usages up so that their order does not matter: costs with `math.fsum`, unknown ones apart from 0.

    >>> total([Usage(input_tokens=2), Usage(input_tokens=3, cost=0.1)])
    Usage(input_tokens=5, output_tokens=None, cached_tokens=None, reasoning_tokens=None, cost=0.1, calls=2)
    """
    known = list(usages)
    costs = [usage.cost for usage in known if usage.cost is not None]
    return Usage(
        input_tokens=_known_sum(usage.input_tokens for usage in known),
        output_tokens=_known_sum(usage.output_tokens for usage in known),
        cached_tokens=_known_sum(usage.cached_tokens for usage in known),
        reasoning_tokens=_known_sum(usage.reasoning_tokens for usage in known),
        cost=fsum(costs) if costs else None,
        calls=sum(usage.calls for usage in known),
    )


def total_by_role(parts: Iterable[Mapping[str, Usage]]) -> dict[str, Usage]:
    """Add up several totals."""
    roles: dict[str, list[Usage]] = {}
    for part in parts:
        for role, usage in part.items():
            roles.setdefault(role, []).append(usage)
    return {role: total(roles[role]) for role in sorted(roles)}


def _known_sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


@contextmanager
def collecting() -> Iterator[Ledger]:
    """Count the calls made inside this block."""
    ledger = Ledger(_current.get())
    token = _current.set(ledger)
    try:
        yield ledger
    finally:
        _current.reset(token)


def count(role: str, usage: Usage) -> None:
    """Count one call in the current ledger, if there is one."""
    ledger = _current.get()
    if ledger is not None:
        ledger.add(role, usage)
