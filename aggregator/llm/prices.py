"""What tokens cost: the provider's own word, then the user's table, then genai-prices where it is installed.

Nothing is fetched from anywhere; an unknown price is None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from msgspec import Struct

from aggregator.errors import ConfigError
from aggregator.records import Usage

_GENAI_PROVIDERS = {  # our name -> that of genai-prices, where they differ
    "gemini": "google",
    "vertex": "google",
    "xai": "x-ai",
    "moonshot": "moonshotai",
}


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
                raise ConfigError(f"expected a price in USD per million tokens >= 0, got {value!r} - at Price.{name}")

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
    if provider == "openrouter" and model.endswith(":free"):
        return Price(input=0.0, output=0.0)
    try:
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price
    except ImportError:
        return None
    tokens = Tokens(input_tokens=1, output_tokens=1)
    provider_id = _GENAI_PROVIDERS.get(provider, provider)
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
    name = f"{provider}/{model}"
    near = get_close_matches(name, table or {}, n=1)
    raise ConfigError(
        f"expected a price for {name!r}, which a budget in USD needs before spending, got none"
        f"{f' (the nearest in the table: {near[0]!r})' if near else ''}; give prices={{{name!r}: "
        "Price(input=…, output=…)} (USD per million tokens) beside the model, or install aggregated-update[prices]"
    )
