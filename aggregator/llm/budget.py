"""A budget that is never exceeded: each request reserves an upper estimate and settles it when its cost is known.

Spent and reserved together never exceed the limit. A request that does not fit with those in flight waits for them,
since they will cost less than they reserved; one that would not fit even alone is refused. Requests are served in their
order, so the refused ones do not depend on the order of answers.

Money is counted in whole picodollars: sums do not depend on their order, and a replay has the same total. `estimate`
returns what calls are likely to cost, and at most, before any is made.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from math import ceil, inf
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct
from msgspec.structs import astuple, replace

from aggregator.checks import is_amount
from aggregator.errors import APITimeoutError, BudgetExceededError, ConfigError
from aggregator.llm.calls import ChatCall, Limits
from aggregator.llm.ledger import find_price, kept_price
from aggregator.llm.messages import normalise
from aggregator.llm.retry import NOT_SENT
from aggregator.records import Usage
from aggregator.text import show_call

if TYPE_CHECKING:
    from aggregator.llm.client import LLM

_PICO = 1_000_000_000_000
THINKING_ROOM = 16_384
"""Tokens for thinking, in addition to the answer's, whose limit counts both."""
_THINKS = re.compile(
    r"(?:ft:)?(?:o\d|gpt-[5-9](?!\d)|gpt-oss|codex)|gemini-(?:2\.5|[3-9])|grok-(?:3-mini|[4-9])|glm-(?:4\.[5-9]|[5-9])"
    r"|.*(?:think|reason|-r1\b|\br1\b|qwq|magistral)",
    re.IGNORECASE,
)
"""Names of models that think by default."""
ASSUMED_OUTPUT = 4096
"""The limit of answers under a budget of tokens or USD if the call sets none; it is sent with the request."""
IMAGE_TOKENS = 50_000
"""More than any known model counts for one image."""


# ---- budgets


class Spending(Struct, frozen=True, kw_only=True):
    """Spent USD, tokens (input and output), requests."""

    usd: float = 0.0
    tokens: int = 0
    calls: int = 0


class Amount(Struct, frozen=True, gc=False):
    """A spending in whole numbers."""

    pico: int = 0
    tokens: int = 0
    calls: int = 0


NOTHING = Amount()
_NAMES = ("usd", "tokens", "calls")
_serials = count()


class Budget:
    """Limits shared by any number of clients, loops and threads; None is no limit.

    `usd` counts dollars, `tokens` input and output together, `calls` the requests sent, retries included. `spent` is
    what was spent so far. Raises ConfigError for a limit that is not a number of at least 0.

    >>> Budget(usd=0.5, calls=100).spent
    Spending(usd=0.0, tokens=0, calls=0)
    """

    def __init__(self, usd: float | None = None, tokens: int | None = None, calls: int | None = None) -> None:
        for name, value in zip(_NAMES, (usd, tokens, calls), strict=True):
            if value is not None and not is_amount(value):
                raise ConfigError(f"Expected a limit >= 0 or None, got {value!r} - at Budget.{name}")
        self.usd, self.tokens, self.calls = usd, tokens, calls
        self.serial = next(_serials)  # the order in which a request reserves from several budgets
        self.needs_tokens = usd is not None or tokens is not None  # otherwise requests are counted, not estimated
        self._most_pico = inf if usd is None else round(usd * _PICO)
        self._most_tokens = inf if tokens is None else tokens
        self._most_calls = inf if calls is None else calls
        self._spent = NOTHING
        self._taken = NOTHING  # spent and reserved
        self._waiting: deque[_Waiter] = deque()
        self._lock = threading.Lock()
        self._runs: dict[str, Amount] = {}  # the counted part of runs that can be resumed
        self._credit = NOTHING  # exchanges already counted, which a resumed run replays

    def __repr__(self) -> str:
        return show_call("Budget", usd=self.usd, tokens=self.tokens, calls=self.calls)

    @property
    def spent(self) -> Spending:
        """The amount spent so far."""
        spent = self._spent
        return Spending(usd=spent.pico / _PICO, tokens=spent.tokens, calls=spent.calls)

    @property
    def reserved(self) -> Spending:
        """The maximum cost of requests in flight."""
        with self._lock:
            held = _add(self._taken, self._spent, -1)
        return Spending(usd=held.pico / _PICO, tokens=held.tokens, calls=held.calls)

    def carry(self, run: str, spent: Spending, *, resumed: bool = True) -> None:
        """Count the saved spending of a run that is resumed.

        A budget that the run itself used has counted that and more, so the replayed rest is not counted again.
        """
        with self._lock:
            seen = self._runs.get(run) if resumed else None
            self._runs[run] = now = Amount(round(spent.usd * _PICO), spent.tokens, spent.calls)
            self._credit = NOTHING if seen is None else _positive(_add(seen, now, -1))
        if seen is None:
            self.settle(NOTHING, now)

    def remember(self, run: str, spent: Spending) -> None:
        """Note a run's spending, in case it is resumed with this budget."""
        with self._lock:
            more = Amount(round(spent.usd * _PICO), spent.tokens, spent.calls)
            self._runs[run] = _add(self._runs.get(run, NOTHING), more, 1)

    def take(self, amount: Amount) -> bool:
        """Reserve an upper estimate if that needs no wait; pair it with `settle`."""
        with self._lock:
            return not self._waiting and self._hold(amount)

    def take_now(self, amount: Amount) -> None:
        """Reserve an upper estimate, ahead of requests that wait; pair it with `settle`.

        Raises BudgetExceededError if it does not fit with spent and reserved amounts; for callers that cannot wait.
        """
        with self._lock:
            if self._hold(amount):
                return
            refusal = self._refusal(amount) or self._crowded(amount)
        raise refusal

    async def reserve(self, amount: Amount, timeout: float | None = None) -> None:
        """Reserve an upper estimate; pair it with `settle`.

        Raises BudgetExceededError if it would not fit even alone, APITimeoutError if the requests in flight did not
        make room in time.
        """
        if self.take(amount):
            return
        with self._lock:
            if (refusal := self._refusal(amount)) is not None:
                raise refusal
            loop = asyncio.get_running_loop()
            waiter = _Waiter(amount, loop, loop.create_future())
            self._waiting.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter.turn
        except BaseException as error:
            self._leave(waiter)
            if isinstance(error, TimeoutError):
                raise APITimeoutError(
                    f"{NOT_SENT}the call's deadline passed, {timeout:.3g} s waiting for requests in flight to leave "
                    "room in the budget"
                ) from None
            raise

    def settle(self, reserved: Amount, spent: Amount, *, replayed: bool = False) -> None:
        """Replace a reservation by the actual cost, and continue waiting requests that fit now."""
        with self._lock:
            if replayed and self._credit is not NOTHING:
                left = _add(self._credit, spent, -1)
                self._credit, spent = _positive(left), _positive(_add(NOTHING, left, -1))
            taken, total = self._taken, self._spent
            self._taken = Amount(
                taken.pico - reserved.pico + spent.pico,
                taken.tokens - reserved.tokens + spent.tokens,
                taken.calls - reserved.calls + spent.calls,
            )
            self._spent = Amount(total.pico + spent.pico, total.tokens + spent.tokens, total.calls + spent.calls)
            served = self._serve() if self._waiting else ()
        for waiter, refusal in served:
            self._wake(waiter, refusal)

    def _leave(self, waiter: _Waiter) -> None:
        """Remove a request that no longer waits: cancelled, timed out or refused."""
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._taken = _add(self._taken, waiter.amount, -1)  # served while it was being cancelled
            served = self._serve()
        for other, refusal in served:
            self._wake(other, refusal)

    def _serve(self) -> list[tuple[_Waiter, BudgetExceededError | None]]:
        """Take from the queue, in order, the requests that fit now and those that never will."""
        served: list[tuple[_Waiter, BudgetExceededError | None]] = []
        while self._waiting:
            waiter, refusal = self._waiting[0], None
            if not self._hold(waiter.amount) and (refusal := self._refusal(waiter.amount)) is None:
                break
            self._waiting.popleft()
            served.append((waiter, refusal))
        return served

    def _wake(self, waiter: _Waiter, refusal: BudgetExceededError | None) -> None:
        """Resolve a waiting request on its own loop; release its amount if it was cancelled."""

        def finish() -> None:
            if not waiter.turn.done():
                if refusal is None:
                    waiter.turn.set_result(None)
                else:
                    waiter.turn.set_exception(refusal)
            elif refusal is None:
                self.settle(waiter.amount, NOTHING)

        try:
            waiter.loop.call_soon_threadsafe(finish)
        except RuntimeError:  # its loop has been closed meanwhile
            if refusal is None:
                self.settle(waiter.amount, NOTHING)

    def _hold(self, amount: Amount) -> bool:
        """Reserve an amount if it fits."""
        taken = self._taken
        pico, tokens, calls = taken.pico + amount.pico, taken.tokens + amount.tokens, taken.calls + amount.calls
        if pico > self._most_pico or tokens > self._most_tokens or calls > self._most_calls:
            return False
        self._taken = Amount(pico, tokens, calls)
        return True

    def _refusal(self, amount: Amount) -> BudgetExceededError | None:
        """Return the error for a request that cannot fit any more, even if those in flight cost nothing."""
        limits = (self._most_pico, self._most_tokens, self._most_calls)
        for name, limit, spent, wanted in zip(_NAMES, limits, astuple(self._spent), astuple(amount), strict=True):
            if spent + wanted > limit:
                unit = _PICO if name == "usd" else 1
                return BudgetExceededError(
                    f"Expected a request within the budget of {limit / unit:g} {name}, got one that may take "
                    f"{wanted / unit:g}, with {spent / unit:g} spent; raise Budget({name}=…) or lower max_tokens"
                )
        return None

    def _crowded(self, amount: Amount) -> BudgetExceededError:
        """Return the error for a request that does not fit while others are in flight."""
        limits = (self._most_pico, self._most_tokens, self._most_calls)
        rows = zip(_NAMES, limits, astuple(self._taken), astuple(self._spent), astuple(amount), strict=True)
        name, limit, taken, spent, wanted = next(row for row in rows if row[2] + row[4] > row[1])
        unit = _PICO if name == "usd" else 1
        return BudgetExceededError(
            f"Expected a request within the budget of {limit / unit:g} {name}, got one that cannot wait and may take "
            f"{wanted / unit:g}, with {spent / unit:g} spent and {(taken - spent) / unit:g} reserved by requests in "
            f"flight; raise Budget({name}=…), lower max_concurrency, or state max_tokens in the call"
        )


def _add(a: Amount, b: Amount, sign: int) -> Amount:
    return Amount(a.pico + sign * b.pico, a.tokens + sign * b.tokens, a.calls + sign * b.calls)


def _positive(amount: Amount) -> Amount:
    return Amount(max(amount.pico, 0), max(amount.tokens, 0), max(amount.calls, 0))


class _Waiter(NamedTuple):
    """A request that waits until those in flight leave room for it."""

    amount: Amount
    loop: asyncio.AbstractEventLoop
    turn: asyncio.Future[None]


_current: ContextVar[Budget | None] = ContextVar("aggregator_budget", default=None)

current_budget = _current.get
"""Return the budget in which every call of this context counts, None outside of any."""


@contextmanager
def spending(budget: Budget | None) -> Iterator[Budget | None]:
    """Count every call made inside, by any client, in `budget`."""
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)


# ---- reserving


def budgets_of(own: Budget | None) -> tuple[Budget, ...]:
    """Return every budget that counts a call of this context, in the order in which all calls reserve."""
    outer = _current.get()
    if outer is None or outer is own:
        return () if own is None else (own,)
    if own is None:
        return (outer,)
    return (own, outer) if own.serial < outer.serial else (outer, own)


def thinks(model: str) -> bool:
    """Return True if a model is known by its name to think before it answers.

    >>> thinks("openai/gpt-5-mini"), thinks("deepseek-reasoner"), thinks("gpt-4o-mini")
    (True, True, False)
    """
    return _THINKS.match(model.rpartition("/")[2]) is not None


def assumed_output(model: str) -> int:
    """Return the limit of an answer that is sent under a budget of tokens or USD if the call states none."""
    return ASSUMED_OUTPUT + (THINKING_ROOM if thinks(model) else 0)


def upper_tokens(body: bytes, messages: Iterable[Mapping[str, Any]], limits: Limits) -> tuple[int, int]:
    """Return the most tokens that a request may take: (input, output).

    A token of text covers at least one byte, and the JSON around each message more bytes than a chat template adds
    tokens; images are counted separately, since their tokens do not depend on their bytes.
    """
    given = len(body)
    for message in messages:
        content = message.get("content")
        if type(content) is not str and isinstance(content, list | tuple):
            given += sum([_image_tokens(part) for part in content])
    return given, (ASSUMED_OUTPUT if limits.tokens is None else limits.tokens) * limits.answers


def _image_tokens(part: Any) -> int:
    """Return the tokens of a part that is not text, in addition to the count of bytes."""
    if not isinstance(part, Mapping) or part.get("type") == "text":
        return 0
    return IMAGE_TOKENS - _data_bytes(part)


def _data_bytes(part: Mapping[str, Any]) -> int:
    """Return the length of an image given as a data URL."""
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    return len(url) if isinstance(url, str) and url.startswith("data:") else 0


def pico(usd: float) -> int:
    """Return dollars as whole picodollars, rounded up.

    >>> pico(0.5)
    500000000000
    """
    return ceil(usd * _PICO)


def spent_by(usage: Usage, held: Amount) -> Amount:
    """Return the cost of one request; the parts that its usage does not state count as reserved."""
    given, answered = usage.input_tokens, usage.output_tokens
    spent = held.pico if usage.cost is None else pico(usage.cost)
    return Amount(spent, held.tokens if given is None or answered is None else given + answered, 1)


_BYTES_A_TOKEN = 4  # of English text, by OpenAI's rule of thumb
_LIKELY_IMAGE = 1_000
_LIKELY_ANSWER = 400


# ---- estimates before a run


class Estimate(Struct, frozen=True, kw_only=True):
    """Calls, tokens and USD: likely, and at most. USD are None if a price is unknown.

    Estimates of the parts of a run add up.
    """

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None
    most_tokens: int
    most_usd: float | None

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            usd=None if self.usd is None or other.usd is None else self.usd + other.usd,
            most_tokens=self.most_tokens + other.most_tokens,
            most_usd=None if self.most_usd is None or other.most_usd is None else self.most_usd + other.most_usd,
        )


def estimate(
    llm: LLM,
    messages: Any,
    *,
    calls: int = 1,
    max_tokens: int | None = None,
    answer_tokens: int | None = None,
    max_attempts: int = 1,
) -> Estimate:
    """Estimate `calls` calls like this one; nothing is sent.

    `answer_tokens` is the usual length of an answer (default: 400, or `max_tokens` if that is less). The most counts
    `max_tokens` (4,096 if not given) for every answer and `max_attempts` requests a call. With several models the
    likely cost is the first one's, and the most counts all.
    """
    if calls < 0 or max_attempts < 1:
        raise ConfigError(f"Expected calls >= 0 and max_attempts >= 1, got {calls!r} and {max_attempts!r}")
    if models := getattr(llm, "models", None):  # fallbacks
        each = [
            estimate(
                model,
                messages,
                calls=calls,
                max_tokens=max_tokens,
                answer_tokens=answer_tokens,
                max_attempts=max_attempts,
            )
            for model in models
        ]
        most = [one.most_usd for one in each]
        return replace(
            each[0],
            most_tokens=sum(one.most_tokens for one in each),
            most_usd=None if None in most else sum(usd for usd in most if usd is not None),
        )
    endpoint = llm.endpoint
    call = ChatCall(model=endpoint.model, messages=normalise(messages), max_tokens=max_tokens)
    most_given, most_answered = upper_tokens(
        endpoint.codec.encode(call).body, call.messages, endpoint.codec.limits(call)
    )
    images = most_given // IMAGE_TOKENS
    given = (most_given - images * IMAGE_TOKENS) // _BYTES_A_TOKEN + images * _LIKELY_IMAGE
    answered = min(answer_tokens or _LIKELY_ANSWER, max_tokens or ASSUMED_OUTPUT)
    price = find_price(endpoint.provider, endpoint.model, llm.prices) or kept_price(endpoint.provider, endpoint.model)
    requests = calls * max_attempts
    return Estimate(
        calls=calls,
        input_tokens=given * calls,
        output_tokens=answered * calls,
        usd=None if price is None else (price.cost(Usage(input_tokens=given, output_tokens=answered)) or 0.0) * calls,
        most_tokens=(most_given + most_answered) * requests,
        most_usd=None if price is None else price.most(most_given, most_answered) * requests,
    )
