"""One logical call, from its first attempt to its answer: tape -> budget -> limiter -> send -> decode -> settle.

All attempts share one attempt budget and one deadline, those with another `response_format` included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from math import inf
from random import Random
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.clients import passing
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.cassettes.tape import Slot, Tape, current_tape
from aggregator.errors import (
    APIConnectionError,
    APIStatusError,
    LLMError,
    QuotaError,
    RateLimitError,
)
from aggregator.llm import tracing
from aggregator.llm.budget import Amount, Budget, as_amount, current_budget, upper_tokens
from aggregator.llm.calls import ChatCall
from aggregator.llm.ledger import count
from aggregator.llm.limiter import Limiter
from aggregator.llm.names import Endpoint
from aggregator.llm.prices import Price, Prices, need_price
from aggregator.llm.retry import RetryPolicy, was_sent
from aggregator.protocols import Transport
from aggregator.records import Completion, HTTPReply, HTTPRequest, Usage

if TYPE_CHECKING:
    from aggregator.llm.pacing import Admission

_NO_HEADERS: Mapping[str, str] = {}
_NOTHING = Amount()


class Line(Struct, kw_only=True):
    """How one model is reached: all that the calls of a client have in common."""

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

    def usage(self, usage: Usage) -> Usage:
        """Add the cost to a usage, where the provider did not say it and the price is known."""
        if usage.cost is not None or self.known_price is None:
            return usage
        cost = self.known_price.cost(usage)
        return usage if cost is None else replace(usage, cost=cost)


class Reservation:
    """What one attempt may cost at most, in every budget that counts it."""

    __slots__ = ("amount", "budgets")

    def __init__(self, budgets: list[Budget], amount: Amount) -> None:
        self.budgets, self.amount = budgets, amount

    def settle(self, usage: Usage | None, *, calls: int = 1) -> None:
        """Count what was spent; an unknown part counts as reserved, since the provider may charge it."""
        reserved = self.amount
        pico, tokens, _ = reserved
        if usage is not None:
            if usage.input_tokens is not None and usage.output_tokens is not None:
                tokens = usage.input_tokens + usage.output_tokens
            if usage.cost is not None:
                pico = as_amount(usage.cost, 0).pico
        for budget in self.budgets:
            budget.settle(reserved, Amount(pico, tokens, calls))

    def release(self) -> None:
        """Give everything back: nothing was sent."""
        for budget in self.budgets:
            budget.settle(self.amount, _NOTHING)


_NO_RESERVATION = Reservation([], _NOTHING)
_FREE = Usage(input_tokens=0, output_tokens=0, cost=0.0)


class Attempts:
    """The attempts of one logical call."""

    def __init__(self, line: Line, timeout: float | None) -> None:
        self.line = line
        self.tape: Tape | None = current_tape()
        self.count = 0
        self._started = line.clock()
        self.limiter: Limiter | None = None  # set while this call holds one of its places
        self._deadline = inf if timeout is None else self._started + timeout

    def remaining(self) -> float:
        """Seconds until the deadline, 0 where it has passed."""
        left = self._deadline - self.line.clock()
        return left if left > 0 else 0.0

    def timeout(self) -> float | None:
        """The same for a wait; None without a deadline."""
        left = self.remaining()
        return None if left == inf else left

    def milliseconds(self) -> float:
        """How long the call has taken so far."""
        return (self.line.clock() - self._started) * 1e3

    def leave(self) -> None:
        """Give up the place in the limiter."""
        if self.limiter is not None:
            self.limiter.leave()
            self.limiter = None

    def issue(self, call: ChatCall) -> tuple[HTTPRequest, Slot | None]:
        """Encode a call and take its ticket; once for each logical call."""
        request = self.line.endpoint.codec.encode(call)
        return request, None if self.tape is None else self.tape.issue(request)

    def is_answerable(self, slot: Slot | None) -> bool:
        """Tell whether a slot can be answered: by its recording, or by the network."""
        return slot is None or self.tape is None or self.tape.records or bool(slot.rows)

    def may_go_on(self) -> bool:
        """Tell whether there is an attempt and time left."""
        return self.count < self.line.policy.max_attempts and self.remaining() > 0

    async def ask(self, call: ChatCall, request: HTTPRequest, slot: Slot | None) -> Completion:
        """Send an issued call until it is answered; raises LLMError with `attempts` set."""
        while True:
            self.count += 1
            attempt = Attempt(self, call, request, slot)
            try:
                return await attempt.run()
            except LLMError as error:
                wait = self.wait_after(error, attempt)
                if wait is None:
                    error.attempts = self.count
                    raise
            if wait:
                await self.line.sleep(wait)

    def wait_after(self, error: LLMError, attempt: Attempt) -> float | None:
        """Return the seconds to wait before the next attempt, None where there is none; teach the limiter."""
        if attempt.ended_in_record():
            return None
        policy = self.line.policy
        headers = _NO_HEADERS if attempt.reply is None else attempt.reply.headers
        wait = policy.delay(
            error, self.count, remaining=self.remaining(), random=self.line.random.random(), headers=headers
        )
        if attempt.admission is None:
            return None if wait is None else 0.0  # a replay meets the failure again, not the wait
        if isinstance(error, RateLimitError) and not isinstance(error, QuotaError) and self.limiter is not None:
            pause = wait or error.retry_after or policy.first_delay
            if pause <= policy.max_retry_after:
                self.limiter.rejected(attempt.admission, pause)
                return None if wait is None else 0.0  # the limiter holds everybody back, this call included
        return wait


class Attempt:
    """One request and what came of it."""

    __slots__ = ("admission", "attempts", "call", "reply", "request", "sent", "slot")

    def __init__(self, attempts: Attempts, call: ChatCall, request: HTTPRequest, slot: Slot | None) -> None:
        self.attempts, self.call, self.request, self.slot = attempts, call, request, slot
        self.sent = False
        self.admission: Admission | None = None  # None: played from the tape
        self.reply: HTTPReply | None = None

    def ended_in_record(self) -> bool:
        """Tell whether the recorded call gave up here (its deadline, fewer attempts): a replay does the same."""
        tape, slot = self.attempts.tape, self.slot
        if self.admission is not None or tape is None or slot is None or tape.records:
            return False
        return 0 < len(slot.rows) <= slot.played

    async def run(self) -> Completion:
        """Play or send; raises LLMError. Whatever happens, the budget is settled."""
        reservation = await self.reserve()
        completion, error = None, None
        try:
            completion = await self._answer()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.settle(reservation, completion, error)
        return completion

    async def reserve(self) -> Reservation:
        """Set the most that this attempt can cost aside."""
        attempts = self.attempts
        budget, outer = attempts.line.budget, current_budget()
        if budget is None and outer is None:
            return _NO_RESERVATION
        budgets = [one for one in (budget, outer) if one is not None]
        if len(budgets) == 2:
            if budget is outer:
                budgets.pop()
            budgets.sort(key=lambda one: one.serial)  # one order for all, or two could wait for each other
        held = Reservation([], self._most(budgets))
        try:
            for one in budgets:
                if not one.take(held.amount):
                    attempts.leave()  # whoever holds the budget may be waiting for this place
                    await one.reserve(held.amount, attempts.timeout())
                held.budgets.append(one)
        except BaseException:
            held.release()
            raise
        return held

    def _most(self, budgets: list[Budget]) -> Amount:
        if not any(budget.needs_tokens for budget in budgets):
            return Amount(0, 0, 1)
        given, answered = upper_tokens(self.request.body, self.call)
        in_usd = any(budget.usd is not None for budget in budgets)
        usd = self.attempts.line.price().most(given, answered) if in_usd else None
        return as_amount(usd, given + answered)

    def settle(self, reservation: Reservation, completion: Completion | None, error: BaseException | None) -> None:
        """Count what this attempt cost, and tell of it."""
        if completion is not None:
            reservation.settle(completion.usage)
            count(current_role(), completion.usage)
        elif isinstance(error, APIStatusError):
            reservation.settle(_FREE)
        elif was_sent(error) if isinstance(error, LLMError) else self.sent:
            reservation.settle(None)
        else:
            reservation.release()
        if tracing.listening():
            self._trace(error, completion)

    async def _answer(self) -> Completion:
        tape, slot = self.attempts.tape, self.slot
        if tape is not None and slot is not None:
            played = tape.play(slot)
            if played is not None:
                self.reply = played
                await asyncio.sleep(tape.delay(played))  # at least one turn, as a live answer would take
                return self._decode(played)
        reply = self.reply = await self._send()
        if tape is None or slot is None:
            return self._decode(reply)
        try:
            completion = self._decode(reply)
        except LLMError:
            tape.record(slot, reply)
            raise
        tape.record(slot, reply, usage=completion.usage, model=completion.model or self.call.model)
        return completion

    async def _send(self) -> HTTPReply:
        attempts = self.attempts
        try:
            limiter = await self.admit()
            with passing():
                reply = await attempts.line.transport.send(self.request, timeout=attempts.timeout())
        except APIConnectionError as error:
            if attempts.tape is not None and self.slot is not None:
                attempts.tape.record_failure(self.slot, error)
            raise
        if reply.status != 429 and self.admission is not None:
            limiter.accepted(self.admission, reply.headers)
        return reply

    async def admit(self) -> Limiter:
        """Wait until this attempt may be sent; the call keeps its place in the limiter until it is answered."""
        attempts = self.attempts
        attempts.line.endpoint.require_key()
        limiter = attempts.limiter
        if limiter is None:
            limiter = attempts.line.limiter()
            await limiter.enter(attempts.timeout())
            attempts.limiter = limiter
        tokens = self._expected_tokens() if limiter.tpm is not None else 0.0
        self.admission = await limiter.admit(tokens, attempts.timeout())
        self.sent = True
        return limiter

    def _expected_tokens(self) -> float:
        """What counts against tokens per minute: about four bytes a token, and the answer's limit."""
        given, answered = upper_tokens(self.request.body, self.call)
        return given / 4 + answered

    def _decode(self, reply: HTTPReply) -> Completion:
        """Read an answer; an error status becomes its error."""
        codec = self.attempts.line.endpoint.codec
        if reply.status >= 300:
            raise codec.error(reply)
        return self.accounted(codec.decode(reply, self.call))

    def accounted(self, completion: Completion) -> Completion:
        """Add the cost and the number of attempts; tell the limiter the tokens."""
        attempts = self.attempts
        usage = attempts.line.usage(completion.usage)
        if self.admission is not None and attempts.limiter is not None and usage.input_tokens is not None:
            attempts.limiter.used(self.admission, usage.total_tokens)
        if usage is completion.usage and attempts.count == 1:
            return completion
        return replace(completion, usage=usage, attempts=attempts.count)

    def _trace(self, error: BaseException | None, completion: Completion | None) -> None:
        reply = self.reply
        tracing.event(
            "llm.attempt",
            lineage=current_lineage() or None,
            role=current_role(),
            provider=self.attempts.line.endpoint.provider,
            model=self.call.model,
            attempt=self.attempts.count,
            status=reply.status if reply is not None else None,
            ms=round(reply.milliseconds, 3) if reply is not None else None,
            ttft=round(reply.chunks[0][1], 3) if reply is not None and reply.chunks else None,
            replayed=self.admission is None,
            error=type(error).__name__ if error is not None else None,
            code=getattr(error, "code", None),
            **tracing.usage_facts(completion.usage if completion is not None else None),
        )
