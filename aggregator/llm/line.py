"""How one model is reached: what all calls of a client have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random

from msgspec import Struct
from msgspec.structs import replace

from aggregator.llm.budget import Amount, Budget, pico, upper_tokens
from aggregator.llm.calls import ChatCall
from aggregator.llm.limiter import Limiter
from aggregator.llm.names import Endpoint
from aggregator.llm.prices import Price, Prices, need_price
from aggregator.llm.retry import RetryPolicy
from aggregator.protocols import Transport
from aggregator.records import Completion, HTTPRequest

_ONE_CALL = Amount(calls=1)


class Line(Struct, kw_only=True):
    """Endpoint, transport and limits of a model; `known_price` is looked up when a budget first needs it."""

    endpoint: Endpoint
    transport: Transport
    limiter: Callable[[], Limiter]
    policy: RetryPolicy
    budget: Budget | None
    prices: Prices | None
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]
    random: Random
    known_price: Price | None = None

    def price(self) -> Price:
        """Return the model's price; raises ConfigError where there is none."""
        if self.known_price is None:
            self.known_price = need_price(self.endpoint.provider, self.endpoint.model, self.prices)
        return self.known_price

    def priced(self, completion: Completion, attempts: int) -> Completion:
        """Add the number of attempts, and the cost where the provider did not say it and the price is known."""
        usage = completion.usage
        if usage.cost is None and self.known_price is not None:
            cost = self.known_price.cost(usage)
            if cost is not None:
                return replace(completion, usage=replace(usage, cost=cost), attempts=attempts)
        return completion if attempts == 1 else replace(completion, attempts=attempts)

    def most(self, call: ChatCall, request: HTTPRequest, budgets: Sequence[Budget]) -> Amount:
        """Return the most that one request can cost; raises ConfigError where a price is needed and unknown."""
        needs_tokens = needs_price = False
        for budget in budgets:
            needs_tokens = needs_tokens or budget.needs_tokens
            needs_price = needs_price or budget.usd is not None
        if not needs_tokens:
            return _ONE_CALL
        given, answered = upper_tokens(request.body, call)
        price = (self.known_price or self.price()) if needs_price else None
        return Amount(0 if price is None else pico(price.most(given, answered)), given + answered, 1)
