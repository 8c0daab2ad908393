"""One logical call, from its first attempt to its answer: tape -> budget -> limiter -> send -> decode -> settle.

All attempts share one attempt budget and one deadline, those with another `response_format` included. This is the hot
path: nothing is awaited, and no object made, that an undisturbed call does not need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from math import inf
from random import Random

from msgspec import Struct
from msgspec.structs import replace

from aggregator import portal
from aggregator.cassettes.clients import passing
from aggregator.cassettes.current import tape_here
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.cassettes.slots import Slot
from aggregator.cassettes.tape import NO_ANSWER, Tape
from aggregator.cassettes.writing import Entry
from aggregator.errors import APIConnectionError, APIStatusError, LLMError, QuotaError, RateLimitError
from aggregator.llm import tracing
from aggregator.llm.budget import NOTHING, Amount, Budget, budgets_of, capped, pico, upper_tokens
from aggregator.llm.calls import ChatCall
from aggregator.llm.ledger import Price, Prices, count, need_price
from aggregator.llm.limiter import Admission, Limiter
from aggregator.llm.providers import Endpoint
from aggregator.llm.retry import RetryPolicy, was_sent
from aggregator.protocols import Transport
from aggregator.records import Completion, HTTPReply, HTTPRequest, Usage

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


_NO_HEADERS: Mapping[str, str] = {}


class _Turn:
    """`asyncio.sleep(0)` for the hot path, without its two coroutines."""

    def __await__(self) -> Generator[None, None, None]:
        yield


A_TURN = _Turn()


def _never(error: LLMError) -> object:
    return False


class Attempts:
    """The attempts of one logical call; `admission`, `reply`, `sent`, `is_live` are of the attempt under way."""

    __slots__ = (
        "_budgets",
        "_deadline",
        "_held",
        "_started",
        "admission",
        "call",
        "count",
        "is_live",
        "limiter",
        "line",
        "reply",
        "request",
        "sent",
        "slot",
        "tape",
    )

    def __init__(self, line: Line, timeout: float | None) -> None:
        portal.refuse_strays("a call of a model")
        self.line = line
        self.tape: Tape | None = tape_here()
        self.count = 0
        self.limiter: Limiter | None = None  # set while this call holds one of its places
        self._budgets: tuple[Budget, ...] = budgets_of(line.budget)
        self._held: Amount | None = None
        self.admission: Admission | None = None
        self.reply: HTTPReply | None = None
        self.sent = self.is_live = False
        self._started = line.clock()
        self._deadline = inf if timeout is None else self._started + timeout

    def remaining(self) -> float:
        """Seconds until the deadline, 0 where it has passed."""
        left = self._deadline - self.line.clock()
        return left if left > 0 else 0.0

    def timeout(self) -> float | None:
        """The same for a wait; None without a deadline."""
        left = self._deadline - self.line.clock()
        return (left if left > 0 else 0.0) if left != inf else None

    def milliseconds(self) -> float:
        """How long the call has taken so far."""
        return (self.line.clock() - self._started) * 1e3

    def leave(self) -> None:
        """Give up the place in the limiter."""
        if self.limiter is not None:
            self.limiter.leave()
            self.limiter = None

    def issue(self, call: ChatCall) -> None:
        """Encode a call and take its ticket; once for each logical call."""
        if self._budgets and (call.max_tokens or -1) < 0 and any(budget.needs_tokens for budget in self._budgets):
            call = capped(call)
        self.call = call
        self.request: HTTPRequest = self.line.endpoint.codec.encode(call)
        self.slot: Slot | None = None if self.tape is None else self.tape.issue(self.request)

    def is_answerable(self) -> bool:
        """Tell whether the issued call can be answered: by its recording, or by the network."""
        return self.slot is None or self.tape is None or self.tape.records or bool(self.slot.rows)

    def may_go_on(self) -> bool:
        """Tell whether there is an attempt and time left."""
        return self.count < self.line.policy.max_attempts and self.remaining() > 0

    async def ask(self, unless: Callable[[LLMError], object] = _never) -> Completion:  # noqa: C901 - one coroutine
        """Send the issued call until it is answered; raises LLMError with `attempts` set.

        `unless` names errors after which the same request is not worth another attempt. Whatever happens to an attempt,
        the budget is settled and what came is recorded. One long function: each coroutine within costs every call.
        """
        while True:
            self.begin()
            try:
                if self._budgets and not self._take():
                    await self.reserve()
                completion = failed = None
                tape = self.tape
                try:
                    if tape is not None and (reply := self.play(tape)) is not None:
                        delay = tape.delay(reply)
                        await (self.line.sleep(delay) if delay else A_TURN)  # as a live answer would take
                    else:
                        if not self.try_admit():
                            await self.admit()
                        passes = tape is not None and bool(tape.rules.clients)
                        reply = self.reply = await (self._send_past_tape() if passes else self._send())
                        self.heard(reply.status, reply.headers)
                    completion = self._decode(reply)
                except BaseException as error:
                    failed = error
                    raise
                else:
                    return completion
                finally:
                    self.settle(completion, failed)
                    if self.is_live and tape is not None and (entry := self._hand_in(tape, completion, failed)):
                        await A_TURN  # in which what came with it is written in one piece
                        tape.finish(entry)
                    failed = None  # its traceback holds this frame
            except LLMError as error:
                wait = None if unless(error) else self.wait_after(error)
                if wait is None:
                    error.attempts = self.count
                    raise
            if wait:
                await self.line.sleep(wait)

    def begin(self) -> None:
        """Begin the next attempt."""
        self.count += 1
        self.sent = self.is_live = False
        self.admission = self.reply = None

    def _take(self) -> bool:
        """Set the most that this attempt can cost aside, if that needs no waiting."""
        self._held = self.line.most(self.call, self.request, self._budgets)
        return len(self._budgets) == 1 and self._budgets[0].take(self._held)

    async def reserve(self) -> None:
        """Set the most that this attempt can cost aside in every budget that counts it."""
        if not self._budgets:
            return
        amount = self._held = self.line.most(self.call, self.request, self._budgets)
        taken: list[Budget] = []
        try:
            for budget in self._budgets:
                if not budget.take(amount):
                    self.leave()  # whoever holds the budget may be waiting for this place
                    await budget.reserve(amount, self.timeout())
                taken.append(budget)
        except BaseException:
            for budget in taken:
                budget.settle(amount, NOTHING)
            raise

    def play(self, tape: Tape) -> HTTPReply | None:
        """The next recorded answer of this call; None to go live."""
        if self.slot is None:
            return None
        self.reply = reply = tape.play(self.slot)
        self.sent = reply is not None
        return reply

    def _send(self) -> Awaitable[HTTPReply]:
        return self.line.transport.send(self.request, timeout=self.timeout())

    async def _send_past_tape(self) -> HTTPReply:
        with passing():  # the tape has been asked: the patches of `clients=` must not ask it again
            return await self._send()

    def try_admit(self) -> bool:
        """Go live, if that needs no waiting."""
        self.line.endpoint.require_key()
        self.is_live = True
        limiter = self.limiter
        if limiter is None:
            limiter = self.line.limiter()
            if not limiter.try_enter():
                return False
            self.limiter = limiter
        self.admission = limiter.try_admit(self._expected_tokens() if limiter.tpm is not None else 0.0)
        self.sent = self.admission is not None
        return self.sent

    async def admit(self) -> None:
        """Wait until this attempt may be sent; the call keeps its place in the limiter until it is answered."""
        if self.limiter is None:
            limiter = self.line.limiter()
            await limiter.enter(self.timeout())
            self.limiter = limiter
        tokens = self._expected_tokens() if self.limiter.tpm is not None else 0.0
        self.admission = await self.limiter.admit(tokens, self.timeout())
        self.sent = True

    def heard(self, status: int, headers: Mapping[str, str]) -> None:
        """Tell the limiter that the server took the request."""
        if status != 429 and self.admission is not None and self.limiter is not None:
            self.limiter.accepted(self.admission, headers)

    def _expected_tokens(self) -> float:
        """What counts against tokens per minute: about four bytes a token, and the answer's limit."""
        given, answered = upper_tokens(self.request.body, self.call)
        return given / 4 + answered

    def _decode(self, reply: HTTPReply) -> Completion:
        """Read an answer; an error status becomes its error."""
        codec = self.line.endpoint.codec
        if reply.status >= 300:
            raise codec.error(reply)
        return self.line.priced(codec.decode(reply, self.call), self.count)

    def _hand_in(self, tape: Tape, completion: Completion | None, error: BaseException | None) -> Entry | None:
        """Hand a live answer to the tape, or that there was none; the loop writes it in its next turn."""
        failure = error if isinstance(error, APIConnectionError) else None
        if self.slot is None or (self.reply is None and failure is None):
            return None
        usage = None if completion is None else completion.usage
        model = (completion and completion.model) or self.call.model
        entry, is_first = tape.hand_in(self.slot, self.reply or NO_ANSWER, usage=usage, model=model, failure=failure)
        if is_first:
            asyncio.get_running_loop().call_soon(tape.flush)
        return entry

    def settle(self, completion: Completion | None, error: BaseException | None) -> None:
        """Count what the attempt under way cost, and tell of it."""
        if completion is not None:
            usage = completion.usage
            count(current_role(), usage)
            if self.limiter is not None and self.limiter.tpm is not None and self.admission is not None:
                self.limiter.used(self.admission, usage.total_tokens)
        if self._held is not None:
            spent = self._spent(self._held, None if completion is None else completion.usage, error)
            for budget in self._budgets:
                budget.settle(self._held, spent)
            self._held = None
        if tracing.listening():
            self._trace(error, completion)

    def _spent(self, held: Amount, usage: Usage | None, error: BaseException | None) -> Amount:
        """What an attempt cost. An unknown part counts as reserved, since the provider may charge it."""
        if usage is not None:
            known = usage.input_tokens is not None and usage.output_tokens is not None
            return Amount(
                held.pico if usage.cost is None else pico(usage.cost), usage.total_tokens if known else held.tokens, 1
            )
        if isinstance(error, APIStatusError):
            return Amount(0, 0, 1)
        if was_sent(error) if isinstance(error, LLMError) else self.sent:
            return held
        return NOTHING

    def wait_after(self, error: LLMError) -> float | None:
        """Return the seconds to wait before the next attempt, None where there is none; teach the limiter."""
        if self._ended_in_record():
            return None
        policy = self.line.policy
        headers = _NO_HEADERS if self.reply is None else self.reply.headers
        wait = policy.delay(
            error, self.count, remaining=self.remaining(), random=self.line.random.random(), headers=headers
        )
        if not self.is_live:
            return None if wait is None else 0.0  # a replay meets the failure again, not the wait
        if isinstance(error, RateLimitError) and not isinstance(error, QuotaError) and self.admission is not None:
            pause = wait or error.retry_after or policy.first_delay
            if pause <= policy.max_retry_after and self.limiter is not None:
                self.limiter.rejected(self.admission, pause)
                return None if wait is None else 0.0  # the limiter holds everybody back, this call included
        return wait

    def _ended_in_record(self) -> bool:
        """Tell whether the recorded call gave up here (its deadline, fewer attempts): a replay does the same."""
        tape, slot = self.tape, self.slot
        if self.is_live or tape is None or slot is None or tape.records:
            return False
        return 0 < len(slot.rows) <= slot.played

    def _trace(self, error: BaseException | None, completion: Completion | None) -> None:
        reply = self.reply
        tracing.event(
            "llm.attempt",
            lineage=current_lineage() or None,
            role=current_role(),
            provider=self.line.endpoint.provider,
            model=self.call.model,
            attempt=self.count,
            status=reply.status if reply is not None else None,
            ms=round(reply.milliseconds, 3) if reply is not None else None,
            ttft=round(reply.chunks[0][1], 3) if reply is not None and reply.chunks else None,
            replayed=not self.is_live,
            error=type(error).__name__ if error is not None else None,
            code=getattr(error, "code", None),
            **tracing.usage_facts(completion.usage if completion is not None else None),
        )
