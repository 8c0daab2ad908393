"""Our cassettes, budgets, limits and retries for other clients: a transport for httpx, and so for SDKs that use it.

    AsyncOpenAI(http_client=httpx.AsyncClient(transport=aggregator.transport()), max_retries=0)

No function is patched, and trio works like asyncio. A request is handled by one generator, `_course`, which requests
waits and sending; `handle_request` and `handle_async_request` perform these for threads and for event loops.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from math import inf
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.clients import kind_of, to_request
from aggregator.cassettes.lineage import is_passing, passing
from aggregator.cassettes.patches.httpx import aread, module_of, played, raised, read, tee_of, teed
from aggregator.cassettes.traffic import Turn, begin
from aggregator.checks import check_positive
from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError, LLMError
from aggregator.llm.budget import Budget
from aggregator.llm.codecs.failures import retry_after
from aggregator.llm.ledger import Prices
from aggregator.llm.limiter import check_limits
from aggregator.llm.observed import Observed, Part, part_here
from aggregator.llm.pacing import Admission, Pace, Pacing
from aggregator.llm.reading import read_failure, read_question
from aggregator.llm.retry import RetryPolicy
from aggregator.records import HTTPReply


class Wait(Struct, frozen=True):
    """Requests a wait of this number of seconds."""

    seconds: float


class Send(Struct, frozen=True):
    """Requests sending, and reading the answer unless `tee(response)` shows it while it is read."""

    turn: Turn


class Sent(Struct, frozen=True):
    """The driver's answer to `Send`: a response, with its body if that was read, or an error."""

    response: Any = None
    body: bytes | None = None
    error: BaseException | None = None


class Done(Struct, frozen=True):
    """Ends a course with its response."""

    response: Any


class Came(Struct, frozen=True, kw_only=True):
    """The result of one attempt: an error, a response with its decoded reply, or a streamed response.

    `is_held` is True if the throttle makes the next attempt wait.
    """

    error: Exception | None = None
    reply: HTTPReply | None = None
    response: Any = None
    is_live: bool = False
    is_held: bool = False


class Throttle:
    """Spaces the requests of all threads and event loops: at most `rpm` a minute, and the pace learned from 429s."""

    def __init__(self, rpm: float | None, *, adaptive: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.adaptive = adaptive
        self.clock = clock
        self._requests = Pace.per_minute(rpm)
        self._learned = Pacing()
        self._lock = threading.Lock()

    def admit(self) -> Admission | float:
        """Return the permission to send now, or the seconds until the next check."""
        with self._lock:
            now = self.clock()
            ready = max(self._requests.ready_at(), self._learned.ready_at)
            if ready > now:
                return ready - now
            self._requests.take(1, now)
            return self._learned.take(now)

    def accepted(self, admission: Admission) -> None:
        """Record any answer but a 429."""
        with self._lock:
            self._learned.accepted(admission, self.clock)

    def rejected(self, admission: Admission, wait: float) -> bool:
        """Record a 429 with a wait in seconds; return True if the throttle delays all requests for it."""
        with self._lock:
            return self.adaptive and self._learned.rejected(admission, wait, self.clock())


class Bridge:
    """A transport's handling of a request, for sync and async callers."""

    def __init__(
        self,
        throttle: Throttle,
        policy: RetryPolicy,
        max_concurrency: int,
        *,
        budget: Budget | None,
        prices: Prices | None,
    ) -> None:
        self.throttle, self.policy, self.max_concurrency = throttle, policy, max_concurrency
        self.budget, self.prices = budget, prices
        self.places = threading.BoundedSemaphore(max_concurrency)
        self.loops: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._random = Random()  # noqa: S311 - jitter, no secret

    def course(self, module: Any, request: Any, body: bytes) -> Generator[Wait | Send | Done, Any, None]:
        """Yield the actions for a request, its response last; raises the exception for its client."""
        url, number = str(request.url), 0
        part = Part(Observed((), self.prices, self.budget), shared=part_here())
        while True:
            number += 1
            turn = begin("httpx", to_request(request.method, url, body, request.headers), shown=part)
            if turn.failure is not None:
                yield Wait(turn.delay)
                came = Came(error=raised(module, turn.failure, request))
            elif turn.reply is not None:
                yield Wait(turn.delay)
                came = Came(reply=turn.reply, response=played(module, turn.reply, request.method))
            else:
                came = yield from self._live(module, turn)
            wait = self._wait_after(turn, number, came)
            if wait is None:
                if came.error is not None:
                    raise came.error
                yield Done(came.response)
                return
            if came.is_live:  # a replay meets the failure again, not the wait
                yield Wait(wait)

    def _live(self, module: Any, turn: Turn) -> Generator[Wait | Send, Any, Came]:
        """Send a request once the throttle allows it, and show its answer."""
        while not isinstance(admission := self.throttle.admit(), Admission):
            yield Wait(admission)
        sent: Sent = yield Send(turn)
        if sent.error is not None:
            if not isinstance(sent.error, module.TransportError):
                turn.withdraw()
                raise sent.error
            turn.fail(kind_of(sent.error, module.__name__), str(sent.error))
            return Came(error=sent.error, is_live=True)
        response = sent.response
        if sent.body is None:  # a stream
            self.throttle.accepted(admission)
            return Came(response=response, is_live=True)
        reply = turn.answer(response.status_code, response.reason_phrase, response.headers.multi_items(), sent.body)
        turn.finish(reply)
        response.stream = module.ByteStream(sent.body)
        is_held = False
        if reply.status == 429:
            is_held = self.throttle.rejected(admission, retry_after(reply.headers) or self.policy.first_delay)
        else:
            self.throttle.accepted(admission)
        return Came(reply=reply, response=response, is_live=True, is_held=is_held)

    def _wait_after(self, turn: Turn, number: int, came: Came) -> float | None:
        """Return the seconds to wait before the next attempt; None if there is none."""
        failure: LLMError | None = None
        if came.error is not None:
            kind = APITimeoutError if "Timeout" in type(came.error).__name__ else APIConnectionError
            failure = kind(str(came.error))
        elif came.reply is not None and came.reply.status >= 400:
            failure = read_failure(read_question(turn.request), came.reply)
        if failure is None:
            return None
        headers = {} if came.reply is None else came.reply.headers
        wait = self.policy.delay(failure, number, remaining=inf, random=self._random.random(), headers=headers)
        return 0.0 if wait is not None and came.is_held else wait


class Driver:
    """Performs the actions of a course, in threads and in event loops, for requests of httpx and of httpx2."""

    def __init__(self, bridge: Bridge, inner: Any) -> None:
        self._bridge = bridge
        self._given = inner
        self._made: dict[tuple[str, str], Any] = {}

    def __repr__(self) -> str:
        return "aggregator.transport()"

    def _inner(self, module: Any, kind: str) -> Any:
        """Return the transport that sends the requests, created on first use."""
        if self._given is not None:
            return self._given
        key = module.__name__, kind
        return self._made.get(key) or self._made.setdefault(key, getattr(module, kind)())

    def handle_request(self, request: Any) -> Any:
        """Answer a request from synchronous code."""
        module = module_of(request)
        inner = self._inner(module, "HTTPTransport")
        if is_passing():
            return inner.handle_request(request)
        body = b"".join(request.stream)
        request.stream = module.ByteStream(body)
        with self._bridge.places:
            course, sent = self._bridge.course(module, request, body), None
            while not isinstance(step := course.send(sent), Done):
                sent = None
                if isinstance(step, Send):
                    sent = self._send(inner, request, step.turn)
                elif step.seconds:
                    time.sleep(step.seconds)
        return step.response

    def _send(self, inner: Any, request: Any, turn: Turn) -> Sent:
        try:
            with passing():
                response = inner.handle_request(request)
                tee = tee_of(turn, response)
                body = read(response.stream) if tee is None else None
        except BaseException as error:  # noqa: BLE001 - the course decides
            return Sent(error=error)
        if tee is not None:
            response.stream = teed(module_of(request))(response.stream, tee)
        return Sent(response, body)

    async def handle_async_request(self, request: Any) -> Any:
        """Answer a request from an event loop of asyncio or trio."""
        module = module_of(request)
        inner = self._inner(module, "AsyncHTTPTransport")
        if is_passing():
            return await inner.handle_async_request(request)
        from anyio import sleep  # comes with httpx

        body = b"".join([part async for part in request.stream])
        request.stream = module.ByteStream(body)
        async with self._places():
            course, sent = self._bridge.course(module, request, body), None
            while not isinstance(step := course.send(sent), Done):
                sent = None
                if isinstance(step, Send):
                    sent = await self._asend(inner, request, step.turn)
                else:
                    await sleep(step.seconds)
        return step.response

    async def _asend(self, inner: Any, request: Any, turn: Turn) -> Sent:
        try:
            with passing():
                response = await inner.handle_async_request(request)
                tee = tee_of(turn, response)
                body = await aread(response.stream) if tee is None else None
        except BaseException as error:  # noqa: BLE001 - the course decides
            return Sent(error=error)
        if tee is not None:
            response.stream = teed(module_of(request))(response.stream, tee)
        return Sent(response, body)

    def _places(self) -> Any:
        """Return the semaphore of this event loop."""
        from anyio import Semaphore
        from anyio.lowlevel import current_token

        token: Any = current_token()
        loops, loop = self._bridge.loops, getattr(token, "native_token", token)
        return loops.get(loop) or loops.setdefault(loop, Semaphore(self._bridge.max_concurrency))

    def close(self) -> None:
        """Close the transport for synchronous code."""
        for inner in self._all("HTTPTransport", "close"):
            inner.close()

    async def aclose(self) -> None:
        """Close the transports for event loops."""
        for inner in self._all("AsyncHTTPTransport", "aclose"):
            await inner.aclose()

    def _all(self, kind: str, method: str) -> list[Any]:
        made = [one for (_, name), one in self._made.items() if name == kind]
        return [one for one in (self._given, *made) if hasattr(one, method)]


def transport(
    *,
    inner: Any = None,
    budget: Budget | None = None,
    prices: Prices | None = None,
    max_attempts: int = 3,
    max_concurrency: int = 64,
    rpm: float | None = None,
    adaptive: bool = True,
    retry: RetryPolicy | None = None,
) -> Any:
    """Return a transport for `httpx.AsyncClient(transport=...)` and `httpx.Client(transport=...)`.

    Its requests are recorded and replayed by any open cassette, count in the budget of a run and in `budget`, are shown
    in transcripts, are retried after lost connections, 429s and 5xx (`max_attempts` requests at most; set the SDK's own
    `max_retries=0`), and respect the limits: `max_concurrency` requests at once in each event loop and over all
    threads, `rpm` a minute, and the pace learned from 429s (`adaptive`). `inner` sends the requests, by default
    `httpx.HTTPTransport()` and `httpx.AsyncHTTPTransport()`: give one for a proxy or custom certificates. `prices` are
    those of models without a known price, for a budget in USD.
    """
    check_positive("max_attempts", max_attempts)
    check_limits(max_concurrency=max_concurrency, rpm=rpm, tpm=None)
    policy = replace(retry or RetryPolicy(), max_attempts=max_attempts)
    throttle = Throttle(rpm, adaptive=adaptive)
    return _class()(Bridge(throttle, policy, max_concurrency, budget=budget, prices=prices), inner)


def _class() -> type:
    """Return the driver as a transport of httpx or httpx2, if imported; imported here if neither is."""
    loaded = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    if not loaded:
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("Expected httpx for aggregator.transport(), got none; install httpx") from error
        loaded = [httpx]
    bases = [base for module in loaded for base in (module.BaseTransport, module.AsyncBaseTransport)]
    return type("Transport", (Driver, *bases), {"__module__": __name__})
