"""The cost of the calls of one context, by role.

A ledger counts every call made inside `collecting()`, from every task and thread; inner ledgers also count in the outer
ones. Totals do not depend on the order in which calls finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache, partial
from math import fsum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from aggregator.checks import is_amount
from aggregator.errors import ConfigError
from aggregator.llm.codecs.wire import MOST_TOKENS
from aggregator.llm.providers import providers
from aggregator.records import Completion, Usage

_current: ContextVar[Ledger | None] = ContextVar("aggregator_ledger", default=None)


current_ledger = _current.get
"""Return the ledger of this context, None outside of any."""


# ---- usage by role


class Ledger:
    """Usage by role of the calls made in one context."""

    def __init__(self, outer: Ledger | None = None) -> None:
        self._entries: dict[str, list[Usage]] = {}
        self._milliseconds: list[tuple[str, float]] = []
        self._outer = outer

    def add(self, role: str, usage: Usage, milliseconds: float = 0.0) -> None:
        """Count one call and its time, in whole microseconds as a recording has it."""
        self._entries.setdefault(role, []).append(usage)
        self._milliseconds.append((role, round(milliseconds, 3)))
        if self._outer is not None:
            self._outer.add(role, usage, milliseconds)

    def detach(self) -> None:
        """Stop counting in the outer ledgers; later calls belong to abandoned work."""
        self._outer = None

    def measures(self, *, without: str = "") -> dict[str, float]:
        """Return `milliseconds` of all calls and, if every price is known, their `cost` in USD; {} without a call.

        Calls of the role `without` do not count.
        """
        usages = [usage for role, usage in self.entries() if role != without] if self._entries else ()
        if not usages:
            return {}
        costs = [usage.cost for usage in usages if usage.cost is not None]
        cost = {"cost": fsum(costs)} if len(costs) == len(usages) else {}
        return {**cost, "milliseconds": fsum(taken for role, taken in self._milliseconds if role != without)}

    def entries(self) -> list[tuple[str, Usage]]:
        """Return every counted usage with its role."""
        return [(role, usage) for role, usages in self._entries.items() for usage in usages]

    def totals(self) -> dict[str, Usage]:
        """Return the sum per role, roles in alphabetical order."""
        return {role: total(self._entries[role]) for role in sorted(self._entries)}


_TOKENS = tuple(name for name in Usage.__struct_fields__ if name.endswith("_tokens"))


def total(usages: Iterable[Usage]) -> Usage:
    """Add usages up so that their order does not matter: costs with `math.fsum`, with unknown ones distinct from 0.

    >>> both = total([Usage(input_tokens=2), Usage(input_tokens=3, cost=0.1)])
    >>> both.input_tokens, both.output_tokens, both.cost, both.calls
    (5, None, 0.1, 2)
    """
    calls = estimated = 0
    tokens: dict[str, Any] = dict.fromkeys(_TOKENS)
    costs: list[float] = []
    for usage in usages:
        calls += usage.calls
        estimated += usage.estimated_calls
        if usage.cost is not None:
            costs.append(usage.cost)
        for name in _TOKENS:
            if (known := getattr(usage, name)) is not None:
                tokens[name] = known + (tokens[name] or 0)
    return Usage(cost=fsum(costs) if costs else None, calls=calls, estimated_calls=estimated, **tokens)


def total_by_role(parts: Iterable[Mapping[str, Usage]]) -> dict[str, Usage]:
    """Add up several totals."""
    roles: dict[str, list[Usage]] = {}
    for part in parts:
        for role, usage in part.items():
            roles.setdefault(role, []).append(usage)
    return {role: total(roles[role]) for role in sorted(roles)}


class collecting(AbstractContextManager[Ledger]):  # noqa: N801 - reads as a word at its use, once per instance
    """Count the calls made inside this block."""

    def __enter__(self) -> Ledger:
        ledger = Ledger(_current.get())
        self._token = _current.set(ledger)
        return ledger

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)


def count(role: str, usage: Usage, milliseconds: float = 0.0) -> None:
    """Count one call in the current ledger, if there is one."""
    ledger = _current.get()
    if ledger is not None:
        ledger.add(role, usage, milliseconds)


# ---- prices


class Tier(Struct, frozen=True, kw_only=True):
    """Prices of requests whose input is longer than `above` tokens; they apply to all tokens of such a request."""

    above: int
    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None


class Price(Struct, frozen=True, kw_only=True):
    """USD per million tokens.

    `cached` is that of input read from a cache, None: like any other input. `cache_write` and `cache_write_1h` are
    those of input written to one for five minutes and for an hour, None: 1.25 and 2 times `input`, as at Anthropic.
    `tiers` are prices of longer prompts. `service` maps a service tier, by the provider's own word, to the factor of
    its price: {"flex": 0.5, "priority": 2}.

    >>> Price(input=0.15, output=0.60).cost(Usage(input_tokens=2_000_000, output_tokens=1_000_000))
    0.9
    """

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None
    tiers: tuple[Tier, ...] = ()
    service: Mapping[str, float] = {}

    def __post_init__(self) -> None:
        rates = ("input", "output", "cached", "cache_write", "cache_write_1h")
        figures = {name: getattr(self, name) for name in rates}
        figures |= {f"tiers[{i}].{name}": getattr(tier, name) for i, tier in enumerate(self.tiers) for name in rates}
        for name, value in (figures | {f"service[{tier!r}]": factor for tier, factor in self.service.items()}).items():
            if value is not None and not is_amount(value):
                raise ConfigError(f"Expected a price in USD per million tokens >= 0, got {value!r} - at Price.{name}")

    def cost(self, usage: Usage, service_tier: str | None = None) -> float | None:
        """Return the USD of one call's usage in the tier that served it; None if its tokens are not known."""
        given, answered = usage.input_tokens, usage.output_tokens
        if given is None or answered is None:
            return None
        if not usage.cached_tokens and not usage.cache_write_tokens and not self.tiers and not self.service:
            return (given * self.input + answered * self.output) / 1e6
        rates: Price | Tier = self
        for tier in self.tiers:
            if given > tier.above and (rates is self or tier.above > rates.above):  # type: ignore[union-attr]
                rates = tier
        left = given
        usd = answered * rates.output
        read = 0 if rates.cached is None else usage.cached_tokens or 0
        for_an_hour = usage.cache_write_1h_tokens or 0
        for tokens, rate in (
            (read, rates.cached or 0.0),
            (for_an_hour, _rate(rates.cache_write_1h, 2.0 * rates.input)),
            ((usage.cache_write_tokens or 0) - for_an_hour, _rate(rates.cache_write, 1.25 * rates.input)),
        ):
            counted = min(max(tokens, 0), left)
            left -= counted
            usd += counted * rate
        return (usd + left * rates.input) * self.service.get(service_tier or "", 1.0) / 1e6

    def most(
        self, input_tokens: int, output_tokens: int, *, writes: float = 1.0, service_tier: str | None = None
    ) -> float:
        """Return the most USD that these tokens can cost, in any tier that the request may get.

        `writes` is 1.25 or 2 for a request that writes to a cache. Without a `service_tier` in the request, any that
        has a factor may serve it; a request for a cheaper one may be served in the usual one.
        """
        if not self.tiers and not self.service and writes == 1.0:  # nearly always
            dearest = self.input if self.cached is None else max(self.input, self.cached)
            return (input_tokens * dearest + output_tokens * self.output) / 1e6
        usd = 0.0
        in_reach: list[Price | Tier] = [self, *[tier for tier in self.tiers if input_tokens > tier.above]]
        for rates in in_reach:
            written = _rate(rates.cache_write_1h if writes > 1.25 else rates.cache_write, writes * rates.input)
            dearest = max(rates.input, rates.cached or 0.0, written if writes > 1 else 0.0)
            usd = max(usd, input_tokens * dearest + output_tokens * rates.output)
        factors = (
            self.service.values() if service_tier in (None, "auto") else [self.service.get(service_tier or "", 1.0)]
        )
        return usd * max(1.0, *factors, 1.0) / 1e6


def _rate(stated: float | None, usual: float) -> float:
    return usual if stated is None else stated


_MOST_USD = 10_000.0


def believed(completion: Completion) -> Usage:
    """Return the usage without impossible figures: negative, absurd, or no tokens at all for an answer.

    A figure that is left out is unknown, and counts in a budget as reserved. If thinking exceeds the output, the server
    counted it in addition.
    """
    usage = completion.usage
    given, answered = usage.input_tokens, usage.output_tokens
    cached = usage.cached_tokens or usage.cache_write_tokens or usage.cache_write_1h_tokens
    has_details = cached or usage.reasoning_tokens or usage.cost
    if given and answered and 0 < given <= MOST_TOKENS and 0 < answered <= MOST_TOKENS and not has_details:
        return usage  # the usual case
    given, answered = _within(given, MOST_TOKENS), _within(answered, MOST_TOKENS)
    thought = _within(usage.reasoning_tokens, MOST_TOKENS)
    if thought is not None and answered is not None and thought > answered:
        answered = _within(answered + thought, MOST_TOKENS)
    cost = None if usage.cost is None or not 0 <= usage.cost <= _MOST_USD else usage.cost
    if not given and not answered and (completion.text or completion.tool_calls):
        given = answered = None
        cost = cost or None  # no price per token times no tokens
    most = MOST_TOKENS if given is None else given
    checked = replace(
        usage,
        input_tokens=given,
        output_tokens=answered,
        cached_tokens=_within(usage.cached_tokens, most),
        reasoning_tokens=thought,
        cost=cost,
        cache_write_tokens=_within(usage.cache_write_tokens, most),
        cache_write_1h_tokens=_within(usage.cache_write_1h_tokens, most),
    )
    return usage if checked == usage else checked


def _within(tokens: int | None, most: int) -> int | None:
    return None if tokens is None or not 0 <= tokens <= most else tokens


Prices = Mapping[str, Price]
"""Model -> price. Names as given to `LLM`, or without the provider: "openai/gpt-4o-mini", "gpt-4o-mini"."""


# ---- price tables


def find_price(provider: str, model: str, table: Prices | None) -> Price | None:
    """Return the user's price of a model, under any spelling of its name; raises ConfigError for another type.

    >>> find_price("openai", "gpt-4o-mini", {"openai:gpt-4o-mini": Price(input=0.15, output=0.6)}).input
    0.15
    """
    for name in (f"{provider}/{model}", f"{provider}:{model}", model):
        if table and name in table:
            given: Any = table[name]
            if not isinstance(given, Price):
                raise ConfigError(f"Expected Price(input=…, output=…) for {name!r}, got {given!r} - at prices")
            return given
    return None


@lru_cache(maxsize=256)
def kept_price(provider: str, model: str) -> Price | None:
    """Return the price in the package genai-prices; None without the package or a price.

    OpenRouter's `:free` models cost nothing, with or without it.

    Tiers of long prompts, cache writes and service tiers come from it too.
    """
    known = providers().get(provider)
    if known is not None and known.free_ending is not None and model.endswith(known.free_ending):
        return Price(input=0.0, output=0.0)
    try:
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price
    except ImportError:
        return None
    provider_id = (known and known.priced_as) or provider
    ask = partial(calc_price, Tokens(input_tokens=1, output_tokens=1), model.removeprefix("models/"))
    try:
        found = ask(provider_id=provider_id)
    except LookupError:
        return None
    if found.provider.id != provider_id:  # it guesses by parts of a name, but another provider's price would be wrong
        return None
    rates = _rates(found.model_price)
    if rates["input"] is None or rates["output"] is None:
        return None
    starts = sorted({tier.start for name in _FIELDS.values() for tier in _tiers(found.model_price, name)})
    return Price(
        **{name: rate for name, rate in rates.items() if rate is not None},
        tiers=tuple([Tier(above=start, **_rates(found.model_price, start)) for start in starts]),  # type: ignore[arg-type]
        service=_factors(partial(ask, provider_id=provider_id), rates["input"]),
    )


_FIELDS = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cached": "cache_read_mtok",
    "cache_write": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
}


def _tiers(price: Any, field: str) -> Any:
    return getattr(getattr(price, field, None), "tiers", ())


def _rates(price: Any, start: int = 0) -> dict[str, float | None]:
    """Return genai-prices' figures for prompts above `start` tokens."""
    rates: dict[str, float | None] = {}
    for name, field in _FIELDS.items():
        stated = getattr(price, field, None)
        reached = [tier.price for tier in _tiers(price, field) if tier.start <= start]
        base = getattr(stated, "base", stated)
        rates[name] = float(reached[-1]) if start and reached else None if base is None else float(base)
    return rates


def _factors(ask: Callable[..., Any], usual: float) -> dict[str, float]:
    """Return the factors of the service tiers that genai-prices knows for a model; older versions know none."""
    factors = {}
    for tier in ("flex", "priority", "batch"):
        try:
            rate = _rates(ask(price_context={"service_tier": tier}).model_price)["input"]
        except (LookupError, TypeError, ValueError):
            continue
        if rate is not None and usual and rate != usual:
            factors[tier] = rate / usual
    return factors


def need_price(provider: str, model: str, table: Prices | None, where: str = "with the model") -> Price:
    """Return a price or raise ConfigError: a budget in USD needs one before anything is spent.

    `where` is where `prices` are passed, for the error message.
    """
    price = find_price(provider, model, table) or kept_price(provider, model)
    if price is not None:
        return price
    from difflib import get_close_matches  # slow to load, and only for this error

    name = f"{provider}/{model}"
    near = get_close_matches(name, table or {}, n=1)
    raise ConfigError(
        f"Expected a price for {name!r}, which a budget in USD needs before spending, got none"
        f"{f' (the nearest in the table: {near[0]!r})' if near else ''}; give prices={{{name!r}: "
        f"Price(input=…, output=…)}} (USD per million tokens) {where}, or install aggregated-update[prices]"
    )
