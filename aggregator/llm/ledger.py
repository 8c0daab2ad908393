"""What the calls of one context cost, by role.

A ledger counts every call made inside `collecting()`, whatever task or thread makes it; inner ledgers also count in
the outer ones. Totals do not depend on the order in which calls finish.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import fsum
from typing import Any

from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.llm.providers import providers
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

    def entries(self) -> list[tuple[str, Usage]]:
        """Return every usage that was counted, with its role."""
        return [(role, usage) for role, usages in self._entries.items() for usage in usages]

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


class Price(Struct, frozen=True, kw_only=True):
    """USD per million tokens; `cached` is that of cached input, None: like any other input.

    >>> Price(input=0.15, output=0.60).cost(Usage(input_tokens=2_000_000, output_tokens=1_000_000))
    0.9
    """

    input: float
    output: float
    cached: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"Expected a price in USD per million tokens >= 0, got {value!r} - at Price.{name}")

    def cost(self, usage: Usage) -> float | None:
        """Return the USD of this usage; None where its tokens are not known."""
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        cached = 0 if self.cached is None else min(usage.cached_tokens or 0, usage.input_tokens)
        return (
            (usage.input_tokens - cached) * self.input
            + cached * (self.cached or 0.0)
            + usage.output_tokens * self.output
        ) / 1e6

    def most(self, input_tokens: int, output_tokens: int) -> float:
        """Return the USD that so many tokens cost at most."""
        dearest = self.input if self.cached is None or self.cached < self.input else self.cached
        return (input_tokens * dearest + output_tokens * self.output) / 1e6


Prices = Mapping[str, Price]
"""Model -> price. Names as given to `LLM`, or without the provider: "openai/gpt-4o-mini", "gpt-4o-mini"."""


def find_price(provider: str, model: str, table: Prices | None) -> Price | None:
    """Return the user's price of a model, under any of the spellings of its name.

    >>> find_price("openai", "gpt-4o-mini", {"openai:gpt-4o-mini": Price(input=0.15, output=0.6)}).input
    0.15
    """
    for name in (f"{provider}/{model}", f"{provider}:{model}", model):
        if table and name in table:
            return table[name]
    return None


@lru_cache(maxsize=256)
def kept_price(provider: str, model: str) -> Price | None:
    """Return the price that the package genai-prices keeps; None without the package or where it knows none.

    OpenRouter's `:free` models cost nothing, with or without it.

    Of a price that depends on the prompt's length the highest counts, so that a budget holds.
    """
    known = providers().get(provider)
    if known is not None and known.free_ending is not None and model.endswith(known.free_ending):
        return Price(input=0.0, output=0.0)
    try:
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price
    except ImportError:
        return None
    tokens = Tokens(input_tokens=1, output_tokens=1)
    provider_id = (known and known.priced_as) or provider
    try:
        found = calc_price(tokens, model.removeprefix("models/"), provider_id=provider_id)
    except LookupError:
        return None
    price = found.model_price
    if found.provider.id != provider_id:  # it guesses from parts of a name; another provider's price would be wrong
        return None
    if price.input_mtok is None or price.output_mtok is None:
        return None
    cached = price.cache_read_mtok
    return Price(
        input=_highest(price.input_mtok),
        output=_highest(price.output_mtok),
        cached=None if cached is None else _highest(cached),
    )


def _highest(price: Any) -> float:
    """The dearest tier of a tiered price."""
    return float(max([price.base, *(tier.price for tier in price.tiers)]) if hasattr(price, "tiers") else price)


def need_price(provider: str, model: str, table: Prices | None) -> Price:
    """Return a price or raise ConfigError: a budget in USD needs one before anything is spent."""
    price = find_price(provider, model, table) or kept_price(provider, model)
    if price is not None:
        return price
    from difflib import get_close_matches  # slow to load, and only for this error

    name = f"{provider}/{model}"
    near = get_close_matches(name, table or {}, n=1)
    raise ConfigError(
        f"Expected a price for {name!r}, which a budget in USD needs before spending, got none"
        f"{f' (the nearest in the table: {near[0]!r})' if near else ''}; give prices={{{name!r}: "
        "Price(input=…, output=…)} (USD per million tokens) beside the model, or install aggregated-update[prices]"
    )
