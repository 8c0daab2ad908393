"""One logical call, from its first attempt to its answer: tape -> budget -> limiter -> send -> decode -> settle.

All attempts share one attempt budget and one deadline, those with another `response_format` included. `Attempts` is the
call, `Attempt` one of its requests; `streams.py` reads the same attempts piece by piece.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from math import inf
from random import Random
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from msgspec import Struct
from msgspec.structs import replace

from aggregator import portal
from aggregator.cassettes.lineage import current_lineage, current_role, passing, tape_here, watcher_here
from aggregator.checks import check_positive, is_number
from aggregator.errors import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    ConfigError,
    LLMError,
    QuotaError,
    RateLimitError,
)
from aggregator.llm import tracing
from aggregator.llm.budget import NOTHING, Amount, Budget, assumed_output, budgets_of, pico, spent_by, upper_tokens
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.failures import scrub
from aggregator.llm.ledger import Price, Prices, believed, current_ledger, find_price, need_price
from aggregator.llm.limiter import Limiter, LoopLimiters, Openings, check_limits
from aggregator.llm.messages import digest
from aggregator.llm.names import Endpoint
from aggregator.llm.pacing import Admission
from aggregator.llm.retry import RetryPolicy, check_answer, was_sent
from aggregator.protocols import Transport
from aggregator.records import Completion, HTTPReply, HTTPRequest, Usage

if TYPE_CHECKING:
    from aggregator.cassettes.slots import Slot
    from aggregator.cassettes.tape import Tape


class Line:
    """The way from one client to one model. A client with an injected clock or sleep has a limiter of its own."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        max_attempts: int,
        timeout: float | None,
        attempt_timeout: float | None,
        max_concurrency: int,
        rpm: float | None,
        tpm: float | None,
        adaptive: bool,
        extra: Mapping[str, Any] | None,
        prices: Prices | None,
        budget: Budget | None,
        retry: RetryPolicy | None,
        transport: Transport | None,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] | None,
        random: Random | None,
    ) -> None:
        check_positive("max_attempts", max_attempts)
        for name, seconds in (("timeout", timeout), ("attempt_timeout", attempt_timeout)):
            if seconds is not None and not (is_number(seconds) and seconds > 0):
                raise ConfigError(f"Expected {name} > 0 seconds or None, got {seconds!r}")
        check_limits(max_concurrency=max_concurrency, rpm=rpm, tpm=tpm)
        for name, value, kind in (
            ("budget", budget, Budget),
            ("retry", retry, RetryPolicy),
            ("prices", prices, Mapping),
        ):
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"Expected {name} as a {kind.__name__} or None, got {value!r}")
        if transport is not None and not callable(getattr(transport, "send", None)):
            raise ConfigError(f"Expected transport as an object with async send(request), or None, got {transport!r}")
        self.endpoint, self.attempt_timeout = endpoint, attempt_timeout
        self.policy = replace(retry or RetryPolicy(), max_attempts=max_attempts)
        self.budget, self.prices, self.extra = budget, prices, merge({}, extra or {}, "LLM.extra")
        self.transport = transport or _shared_transport()
        self.clock, self.sleep = clock, sleep or asyncio.sleep
        self.random = random or Random()  # noqa: S311 - jitter, no secret
        self.corrections = _corrections.setdefault(self.transport, {})
        limits = {"max_concurrency": max_concurrency, "rpm": rpm, "tpm": tpm, "adaptive": adaptive}
        is_real = clock is time.monotonic and sleep is None
        codec = endpoint.codec
        self.limit_headers = frozenset([names.remaining for names in (*codec.requests, *codec.tokens)])
        self.openings = Openings(clock)
        self.limiter = LoopLimiters(endpoint, limits, time=None if is_real else (clock, self.sleep))
        self.known_price = find_price(endpoint.provider, endpoint.model, prices)  # else when first needed

    def with_defaults(self, call: ChatCall) -> ChatCall:
        """Return the call with the client's `extra`, followed by its own."""
        return replace(call, extra=merge(self.extra, call.extra, "extra")) if self.extra else call

    def price(self) -> Price:
        """Return the model's price; raises ConfigError if there is none."""
        if self.known_price is None:
            self.known_price = need_price(self.endpoint.provider, self.endpoint.model, self.prices)
        return self.known_price


def _shared_transport() -> Transport:
    """Return the transport of the process, for clients without an injected one; aiohttp is imported here."""
    from aggregator.llm.transport import shared_transport

    return shared_transport()


_ONE_CALL = Amount(calls=1)
_CACHE_MARK = re.compile(rb'"cache_control"|"cachePoint"')
_HOUR_MARK = re.compile(rb'"ttl"\s*:\s*"1h"')
_NO_HEADERS: Mapping[str, str] = {}


def merge(base: Mapping[str, Any], more: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return both, `more` last; objects under the same name are merged. Raises ConfigError for anything but a dict.

    >>> merge({"provider": {"sort": "price"}}, {"provider": {"only": ["groq"]}}, "extra")
    {'provider': {'sort': 'price', 'only': ['groq']}}
    """
    if not isinstance(more, Mapping):
        raise ConfigError(f"Expected a dict of fields for the request's body, got {more!r} - at {where}")
    both = dict(base)
    for name, value in more.items():
        old = both.get(name)
        both[name] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


_corrections: WeakKeyDictionary[object, dict[tuple[str, str], frozenset[str]]] = WeakKeyDictionary()
# Kept by transport, since it is a trait of servers; an open tape keeps them instead, so that a replay starts from
# nothing.


class Attempts:
    """The attempts of one logical call. `issue` it, then `ask`; always `leave` in the end."""

    def __init__(self, line: Line, timeout: float | None) -> None:
        portal.refuse_strays("a call of a model")
        self.line = line
        self.tape: Tape | None = tape_here()
        self.count = 0
        self.is_traced = tracing.listening()
        self.limiter: Limiter | None = None  # set while this call holds one of its places
        self.budgets = budgets_of(line.budget)
        self._counts_tokens = self._counts_usd = False
        for budget in self.budgets:
            if budget.needs_tokens:
                self._counts_tokens = True
            if budget.usd is not None:
                self._counts_usd = True
        self._started = line.clock()
        self._deadline = inf if timeout is None else self._started + timeout
        self.share = timeout and timeout / 2  # of one attempt, by default

    def remaining(self) -> float:
        """Return the seconds until the deadline, 0 if it has passed."""
        return max(0.0, self._deadline - self.line.clock())

    def timeout(self) -> float | None:
        """Return the same for a wait; None without a deadline."""
        left = self._deadline - self.line.clock()
        if left == inf:
            return None
        return left if left > 0 else 0.0

    def milliseconds(self) -> float:
        """Return the milliseconds since the call began."""
        return (self.line.clock() - self._started) * 1e3

    def leave(self) -> None:
        """Give up the place in the limiter."""
        if self.limiter is not None:
            self.limiter.leave()
            self.limiter = None

    def issue(self, call: ChatCall) -> None:
        """Encode a call and take its ticket; once for each logical call.

        Corrections that the server requested in a refusal are applied. A tape that only plays decides by its recording,
        in which the refusal may have come before or after this call.
        """
        codec, tape = self.line.endpoint.codec, self.tape
        if self._counts_tokens and (call.max_tokens or -1) < 0 and codec.limits(call).tokens is None:
            call = replace(call, max_tokens=assumed_output(call.model))  # so that no answer costs more than is reserved
        if tape is None or tape.records:
            learned = self.line.corrections if tape is None else tape.learned
            known = learned.get(self._server(call)) if learned else None
            self._encode(call if known is None else replace(call, corrections=known))
            return
        self._encode(call)
        if self.is_answerable():
            return
        others = [replace(call, corrections=frozenset({correction})) for correction in codec.corrections]
        for other in (*others, call):  # the usual form again at the end: a miss names it
            if self.slot is not None:  # a correction may leave the request as it is, which then keeps its ticket
                tape.withdraw(self.slot)
            self._encode(other)
            if self.is_answerable():
                return

    def _encode(self, call: ChatCall) -> None:
        self.call = call
        self._most: Amount | None = None
        self.request: HTTPRequest = self.line.endpoint.codec.encode(call)
        self.slot: Slot | None = None
        if self.tape is not None and (admitted := self.tape.admit(self.request)) is not None:
            self.slot = self.tape.issue(admitted)

    def correct(self, error: LLMError) -> bool:
        """Issue the call again as a refusal requests; return False without a known correction or an attempt left."""
        if not isinstance(error, BadRequestError) or not self.may_go_on():
            return False
        corrected = self.line.endpoint.codec.corrected(self.call, error)
        if corrected is None or corrected.corrections <= self.call.corrections:
            return False
        refused = self.call
        self._encode(corrected)
        if not self.is_answerable():  # the recorded call ended here
            self._encode(refused)
            return False
        learned = self.line.corrections if self.tape is None else self.tape.learned
        learned[self._server(refused)] = corrected.corrections
        return True

    def _server(self, call: ChatCall) -> tuple[str, str]:
        return self.line.endpoint.base_url, call.model

    def is_answerable(self) -> bool:
        """Return True if the issued call can be answered: by its recording, or by the network."""
        return self.slot is None or bool(self.slot.rows) or self.tape is None or self.tape.records

    def may_go_on(self) -> bool:
        """Return True if an attempt and time are left."""
        return self.count < self.line.policy.max_attempts and self.remaining() > 0

    async def ask(self, unless: Callable[[LLMError], object] | None = None) -> Completion:
        """Send the issued call until it is answered; raises LLMError with `attempts` set.

        `unless` are errors after which the same request is not sent again.
        """
        while True:
            self.count += 1
            attempt = Attempt(self, self.line, self.tape)
            try:
                if self.budgets and not attempt.take():
                    await attempt.reserve()
                try:
                    if self.tape is None or (reply := attempt.play()) is None:
                        reply = await (attempt.send() if attempt.try_admit() else attempt.admit_and_send())
                    else:
                        delay = self.tape.delay(reply)  # as long as a live answer takes, at least one turn of the loop
                        await (self.line.sleep(delay) if delay else asyncio.sleep(0))
                    completion = attempt.read(reply)
                except BaseException as error:
                    await attempt.end(error)
                    raise
                attempt.settle(None)
                if self.tape is not None and attempt.is_live:
                    await attempt.record(None)
            except LLMError as error:
                if (wait := self.wait_after(attempt, error, unless)) is None:
                    raise
            else:
                return completion
            if wait:
                await self.line.sleep(wait)

    def wait_after(
        self, attempt: Attempt, error: LLMError, unless: Callable[[LLMError], object] | None = None
    ) -> float | None:
        """Return the seconds until the next attempt, possibly after issuing the call again; None to give up."""
        if self.correct(error):
            return 0.0
        wait = None if unless is not None and unless(error) else attempt.wait_after(error)
        if wait is None:
            error.attempts = self.count
        return wait

    def most(self) -> Amount:
        """Return the most that one request of this call can cost; raises ConfigError if an unknown price is needed."""
        if self._most is not None:
            return self._most
        if not self._counts_tokens:
            return _ONE_CALL
        call, body, line = self.call, self.request.body, self.line
        given, answered = upper_tokens(body, call.messages, line.endpoint.codec.limits(call))
        self._most = Amount(0, given + answered, 1)
        if not self._counts_usd:
            return self._most
        writes = 1.0
        if b'"cache' in body and _CACHE_MARK.search(body):
            writes = 1.25 if _HOUR_MARK.search(body) is None else 2.0
        tier = call.extra.get("service_tier") if call.extra else None
        price = line.known_price or line.price()
        usd = price.most(given, answered, writes=writes, service_tier=tier if isinstance(tier, str) else None)
        self._most = Amount(pico(usd), given + answered, 1)
        return self._most


class Attempt(Struct, eq=False):
    """One request and its answer: reserve, answer, and in any case settle and record at the end."""

    attempts: Attempts
    line: Line
    tape: Tape | None
    admission: Admission | None = None
    reply: HTTPReply | None = None
    completion: Completion | None = None
    was_sent: bool = False
    is_live: bool = False
    opening: bytes | None = None  # digest of the prefix that the provider caches by a mark
    leads: bool = False  # the calls with its opening
    held: Amount | None = None  # in the budgets

    def take(self) -> bool:
        """Reserve the most that this attempt can cost if one budget counts it and has room; `settle` releases it."""
        budgets, most = self.attempts.budgets, self.attempts.most()
        if len(budgets) > 1 or not budgets[0].take(most):
            return False
        self.held = most
        return True

    async def reserve(self) -> None:
        """Wait until every budget that counts this attempt has room for the most that it can cost."""
        most = self.attempts.most()
        taken: list[Budget] = []
        try:
            for budget in self.attempts.budgets:
                if not budget.take(most):
                    self.attempts.leave()  # others that hold the budget may be waiting for this place
                    await budget.reserve(most, self.attempts.timeout())
                taken.append(budget)
        except BaseException:
            for budget in taken:
                budget.settle(most, NOTHING)
            raise
        self.held = most

    def send(self) -> Awaitable[HTTPReply]:
        """Send the admitted request."""
        sending = self.line.transport.send(self.attempts.request, timeout=self.timeout())
        return _pass(sending) if self.is_watched() else sending

    async def admit_and_send(self) -> HTTPReply:
        """Send the request as soon as it may be sent."""
        await self.admit()
        return await self.send()

    async def end(self, error: BaseException | None) -> None:
        """Settle and record this attempt, failed or not."""
        if isinstance(error, LLMError):
            scrub(error, self.attempts.request.secrets)  # for a page or an event that quotes it
        self.settle(error)
        await self.record(error)

    async def record(self, error: BaseException | None) -> None:
        """Write the answer to the tape, before it is used."""
        attempts, tape, slot = self.attempts, self.tape, self.attempts.slot
        if not self.is_live or tape is None or slot is None:
            return
        reply, failure = self.recorded(error)
        if reply is None and failure is None:
            return
        from aggregator.cassettes.tape import NO_ANSWER  # loaded with the tape

        answer = self.completion
        await tape.arecord(
            slot,
            reply or NO_ANSWER,
            usage=None if answer is None else answer.usage,
            model=(answer and answer.model) or attempts.call.model,
            failure=failure,
        )

    def timeout(self, passed: float = 0.0) -> float | None:
        """Return the seconds that this attempt may take, of which some passed.

        The last attempt may take all that is left by default.
        """
        attempts, limit = self.attempts, self.line.attempt_timeout
        left = attempts.timeout()
        if limit is None and attempts.count < self.line.policy.max_attempts:
            limit = attempts.share
        if passed and limit is not None:
            limit = max(0.0, limit - passed)
        return left if limit is None or (left is not None and left < limit) else limit

    def play(self) -> HTTPReply | None:
        """Return the next recorded answer of this call; None to go live."""
        if self.tape is None or self.attempts.slot is None:
            return None
        self.reply = self.tape.play(self.attempts.slot)
        self.was_sent = self.reply is not None
        return self.reply

    def is_watched(self) -> bool:
        """Return True if the patches of `clients=` would look this request up again, or count it twice."""
        if self.tape is not None and self.tape.rules.clients:
            return True
        return watcher_here() is not None

    def try_admit(self) -> bool:
        """Go live if that needs no wait: a place is free, the pace permits it, no call is writing the shared prefix."""
        attempts = self.attempts
        if not attempts.request.secrets:
            attempts.request = self.line.endpoint.authenticated(attempts.request)
        self.is_live = True
        mark = self.line.endpoint.codec.mark(attempts.call)
        if mark is not None:
            self.opening = digest(attempts.call.messages, mark)
            return False
        limiter = attempts.limiter
        if limiter is None:
            limiter = self.line.limiter()
            if not limiter.try_enter():
                return False
            attempts.limiter = limiter
        self.admission = limiter.try_admit() if limiter.tpm is None else None
        self.was_sent = self.admission is not None
        return self.was_sent

    async def admit(self) -> None:
        """Wait until this attempt may be sent; the call keeps its place in the limiter until it is answered."""
        if self.opening is not None:
            self.leads = await self.line.openings.enter(self.opening, self.attempts.timeout())
        limiter = self.attempts.limiter
        if limiter is None:
            limiter = self.line.limiter()
            if not limiter.try_enter():
                await limiter.enter(self.attempts.timeout())
            self.attempts.limiter = limiter
        tokens = 0.0
        if limiter.tpm is not None:  # about four bytes a token, and the answer's limit
            attempts = self.attempts
            limits = self.line.endpoint.codec.limits(attempts.call)
            given, answered = upper_tokens(attempts.request.body, attempts.call.messages, limits)
            tokens = given / 4 + answered
        self.admission = limiter.try_admit(tokens) or await limiter.admit(tokens, self.attempts.timeout())
        self.was_sent = True

    def accept(self, status: int, headers: Mapping[str, str]) -> None:
        """Report to the limiter that the server took the request, and what its headers state about limits."""
        limiter, admission = self.attempts.limiter, self.admission
        if status != 429 and admission is not None and limiter is not None:
            limiter.accepted(admission)
            if not self.line.limit_headers.isdisjoint(headers):
                limiter.apply_headers(admission, headers, self.line.endpoint.codec)

    def read(self, reply: HTTPReply) -> Completion:
        """Read an answer; raises the error of an error status."""
        if self.is_live:
            self.reply = reply
            self.accept(reply.status, reply.headers)
        codec = self.line.endpoint.codec
        if reply.status >= 300:
            raise codec.error(reply)
        return self.complete(codec.decode(reply, self.attempts.call))

    def complete(self, completion: Completion) -> Completion:
        """Keep the answer of this attempt; it counts even if it is broken. Raises LLMError if it is.

        The cost is added if the provider did not state it and the price is known.
        """
        usage, price = believed(completion), self.line.known_price
        if price is not None and usage.cost is None:
            usage = replace(usage, cost=price.cost(usage, completion.service_tier))
        if self.attempts.count > 1 or usage is not completion.usage:
            completion = replace(completion, usage=usage, attempts=self.attempts.count)
        self.completion = completion
        may_be_empty = self.attempts.call.stop is not None
        check_answer(completion, self.line.endpoint.provider, may_be_empty=may_be_empty)
        return completion

    def recorded(self, error: BaseException | None) -> tuple[HTTPReply | None, APIConnectionError | None]:
        """Return the recorded part of this attempt: its reply and the error that ended it; none if cancelled."""
        return self.reply, error if isinstance(error, APIConnectionError) else None

    def settle(self, error: BaseException | None) -> None:
        """Count and report the cost of this attempt."""
        if self.leads and self.opening is not None:
            self.line.openings.leave(self.opening)
        usage = None if self.completion is None else self.completion.usage
        if usage is not None:
            if (ledger := current_ledger()) is not None:
                ledger.add(current_role(), usage, 0.0 if self.reply is None else self.reply.milliseconds)
            limiter = self.attempts.limiter
            if limiter is not None and limiter.tpm is not None and self.admission is not None:
                limiter.used(self.admission, usage.total_tokens)
        if self.held is not None:
            spent = self._spent(self.held, error) if usage is None else spent_by(usage, self.held)
            for budget in self.attempts.budgets:
                budget.settle(self.held, spent, replayed=not self.is_live)
        if self.attempts.is_traced:
            self._trace(usage, error)

    def _spent(self, held: Amount, error: BaseException | None) -> Amount:
        """Return the cost of an attempt without an answer: the reservation, if the provider may charge it."""
        if isinstance(error, APIStatusError):
            return _ONE_CALL
        if was_sent(error) if isinstance(error, LLMError) else self.was_sent:
            return held
        return NOTHING

    def wait_after(self, error: LLMError) -> float | None:
        """Return the seconds until the next attempt, None if there is none; the limiter learns from the error."""
        if self._ended_in_record():
            return None
        if isinstance(error, APIConnectionError):  # the pool's other connections may have died for the same reason
            self.attempts.request = replace(self.attempts.request, fresh=True)
        line, limiter = self.line, self.attempts.limiter
        wait = line.policy.delay(
            error,
            self.attempts.count,
            remaining=self.attempts.remaining(),
            random=line.random.random(),
            headers=_NO_HEADERS if self.reply is None else self.reply.headers,
        )
        if not self.is_live:
            return None if wait is None else 0.0  # a replay repeats the failure without the wait
        if isinstance(error, RateLimitError) and not isinstance(error, QuotaError) and self.admission is not None:
            pause = wait or error.retry_after or line.policy.first_delay
            if pause <= line.policy.max_retry_after and limiter is not None:
                own = limiter.rejected(self.admission, pause)
                return None if wait is None else own  # 0 if the limiter delays every call, this one included
        return wait

    def _ended_in_record(self) -> bool:
        """Return True if the recorded call gave up here (its deadline, fewer attempts), as its replay then does."""
        tape, slot = self.tape, self.attempts.slot
        if self.is_live or tape is None or slot is None or tape.records:
            return False
        return 0 < len(slot.rows) <= slot.played

    def _trace(self, usage: Usage | None, error: BaseException | None) -> None:
        reply = self.reply
        tracing.event(
            "llm.attempt",
            lineage=current_lineage() or None,
            role=current_role(),
            provider=self.line.endpoint.provider,
            model=self.attempts.call.model,
            attempt=self.attempts.count,
            status=reply.status if reply is not None else None,
            ms=round(reply.milliseconds, 3) if reply is not None else None,
            ttft=round(reply.chunks[0][1], 3) if reply is not None and reply.chunks else None,
            replayed=not self.is_live,
            error=type(error).__name__ if error is not None else None,
            code=getattr(error, "code", None),
            **tracing.usage_facts(usage),
        )


async def _pass(sending: Awaitable[HTTPReply]) -> HTTPReply:
    """Send a request that the patches of `clients=` leave alone."""
    with passing():
        return await sending
