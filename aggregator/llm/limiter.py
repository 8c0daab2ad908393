"""The rate of calls to one model: concurrency, requests and tokens per minute, and a pace learned from 429s.

Clients of one event loop share the limiter of a (base_url, key, model). A 429 pauses all of them, unless 429s do not
depend on the pace; afterwards requests are paced, and the pace is learned: see `pacing.py`.

`Openings` also orders calls: a provider that caches prompts by marks (Anthropic, Bedrock, OpenRouter for some models)
charges more for a write and a tenth for a read. Concurrent calls would all write, so one is sent first and the others
wait for its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from aggregator.checks import is_number
from aggregator.errors import APITimeoutError, ConfigError
from aggregator.llm.calls import Codec, Target
from aggregator.llm.codecs.failures import headroom
from aggregator.llm.pacing import Admission, Pace, Pacing
from aggregator.llm.retry import NOT_SENT

if TYPE_CHECKING:
    import asyncio


MAX_HEADER_PAUSE = 60.0


class Limiter:
    """Bounds the calls in flight and spaces their attempts. Used from one event loop.

    `rpm` and `tpm` hold in any window of 60 seconds, because requests are spread evenly with bursts of one second's
    worth. Without `adaptive` a 429 delays only the call that received it. `clock` (monotonic seconds) and `sleep` are
    injected for tests.
    """

    def __init__(
        self,
        *,
        max_concurrency: int = 64,
        rpm: float | None = None,
        tpm: float | None = None,
        adaptive: bool = True,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        check_limits(max_concurrency=max_concurrency, rpm=rpm, tpm=tpm)
        self.max_concurrency = max_concurrency
        self.rpm, self.tpm, self.adaptive = rpm, tpm, adaptive
        self._free = max_concurrency
        self._waiting: dict[asyncio.Future[None], None] = {}
        self._requests = Pace.per_minute(rpm)
        self._tokens = Pace.per_minute(tpm)
        self._learned = Pacing()
        self._paused_until = 0.0
        self._turn = asyncio.Lock()
        self._clock, self._sleep = clock, sleep

    def tighten(self, *, max_concurrency: int, rpm: float | None, tpm: float | None, adaptive: bool = True) -> None:
        """Adopt another client's limits if they are stricter, because both share one account."""
        self.adaptive = self.adaptive or adaptive
        if max_concurrency < self.max_concurrency:
            self._free -= self.max_concurrency - max_concurrency
            self.max_concurrency = max_concurrency
        if rpm is not None and (self.rpm is None or rpm < self.rpm):
            self.rpm, self._requests = rpm, Pace.per_minute(rpm)
        if tpm is not None and (self.tpm is None or tpm < self.tpm):
            self.tpm, self._tokens = tpm, Pace.per_minute(tpm)

    @property
    def in_flight(self) -> int:
        """Calls in flight, including those that wait for another attempt."""
        return self.max_concurrency - self._free

    @property
    def rate(self) -> float:
        """Requests per second, learned from 429s; infinity for no limit."""
        return self._learned.rate

    def try_enter(self) -> bool:
        """Take a place if one is free and no call is waiting; pair it with `leave`."""
        if self._free > 0 and not self._waiting:
            self._free -= 1
            return True
        return False

    async def enter(self, timeout: float | None = None) -> None:
        """Wait for one of the places, first come first served; pair it with `leave`."""
        if self.try_enter():
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[place] = None
        try:
            async with asyncio.timeout(timeout):
                await place
        except BaseException as error:
            self._waiting.pop(place, None)
            if place.done() and not place.cancelled():  # it was given a place while being cancelled
                self.leave()
            if isinstance(error, TimeoutError):
                raise _no_turn(timeout, f"{self.max_concurrency} calls are in flight") from None
            raise

    def leave(self) -> None:
        """Return a place."""
        self._free += 1
        while self._free > 0 and self._waiting:
            place = next(iter(self._waiting))
            del self._waiting[place]
            if not place.done():
                self._free -= 1
                place.set_result(None)

    def try_admit(self, tokens: float = 0.0) -> Admission | None:
        """Admit the next request if no limit delays it; `tokens` is its expected use. Return None otherwise."""
        now = self._clock()
        if self._turn.locked() or self._ready_at(tokens) > now:
            return None
        return self._take(tokens, now)

    async def admit(self, tokens: float = 0.0, timeout: float | None = None) -> Admission:
        """Wait until the next request may be sent, first come, first served."""
        if (admission := self.try_admit(tokens)) is not None:
            return admission
        try:
            async with asyncio.timeout(timeout), self._turn:
                while (wait := self._ready_at(tokens) - (now := self._clock())) > 0:
                    await self._sleep(wait)
                return self._take(tokens, now)
        except TimeoutError:
            raise _no_turn(timeout, "rate limits leave no room") from None

    def _ready_at(self, tokens: float) -> float:
        ready = self._paused_until
        if self._learned.outcomes and (learned := self._learned.ready_at) > ready:
            ready = learned
        if self.rpm is not None and (spaced := self._requests.ready_at()) > ready:
            ready = spaced
        if self.tpm is not None and (spaced := self._tokens.ready_at(tokens)) > ready:
            ready = spaced
        return ready

    def _take(self, tokens: float, now: float) -> Admission:
        if self.rpm is not None:
            self._requests.take(1.0, now)
        if self.tpm is not None:
            self._tokens.take(tokens, now)
        return self._learned.take(now, tokens)

    def accepted(self, admission: Admission) -> None:
        """Record any answer but a 429: the server accepted the request."""
        self._learned.accepted(admission, self._clock)

    def apply_headers(self, admission: Admission, headers: Mapping[str, str], codec: Codec) -> None:
        """Delay requests if those in flight will use up the server's remaining limit by its headers."""
        for names, each in ((codec.requests, 1.0), (codec.tokens, admission.tokens)):
            for name in names:
                if name.remaining in headers:
                    left = headroom(headers, (name,))
                    if left is not None and (missing := self.in_flight * each - left.remaining) > 0:
                        wait = min(missing * left.seconds_each, MAX_HEADER_PAUSE)
                        self._paused_until = max(self._paused_until, self._clock() + wait)
                    break

    def used(self, admission: Admission, tokens: float) -> None:
        """Replace the expected tokens of a request by the real ones."""
        if self.tpm is not None:
            self._tokens.take(tokens - admission.tokens, self._clock())

    def rejected(self, admission: Admission, wait: float) -> float:
        """Record a 429 with a wait of `wait` seconds; return how long its own call has to wait.

        That is 0 if all calls pause and are slower afterwards, including this one.
        """
        return 0.0 if self.adaptive and self._learned.rejected(admission, wait, self._clock()) else wait


def check_limits(*, max_concurrency: int, rpm: float | None, tpm: float | None) -> None:
    """Raise ConfigError for limits that let nothing through."""
    for name, value in (("max_concurrency", max_concurrency), ("rpm", rpm), ("tpm", tpm)):
        if value is not None and not (is_number(value) and value > 0):
            raise ConfigError(f"Expected {name} > 0 (None: no limit), got {value!r}")


def _no_turn(timeout: float | None, why: str) -> APITimeoutError:
    return APITimeoutError(f"{NOT_SENT}the call's deadline passed, {timeout:.3g} s waiting for its turn: {why}")


_Key = tuple[str, str, str]
_Time = tuple[Callable[[], float], Callable[[float], Awaitable[None]]]
_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[_Key, Limiter]] = WeakKeyDictionary()
# Global because the limit is the account's, not a client's; weak, so that it ends with the clients and the event
# loop.


def shared_limiter(
    key: _Key, *, max_concurrency: int, rpm: float | None, tpm: float | None, adaptive: bool = True
) -> Limiter:
    """Return this loop's limiter of (base_url, key, model), with the strictest limits of its clients."""
    known = _limiters.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    limiter = known.get(key)
    if limiter is None:
        limiter = known[key] = Limiter(max_concurrency=max_concurrency, rpm=rpm, tpm=tpm, adaptive=adaptive)
    else:
        limiter.tighten(max_concurrency=max_concurrency, rpm=rpm, tpm=tpm, adaptive=adaptive)
    return limiter


class LoopLimiters:
    """Returns the limiter of the running loop for one endpoint, shared with the other clients of the same account.

    `time` is a clock and a sleep for tests; such a client shares no limiter.
    """

    def __init__(self, target: Target, limits: Mapping[str, Any], *, time: _Time | None = None) -> None:
        key = target.api_key
        account = f"key of {id(key)}" if callable(key) else str(key)
        self._key = (target.base_url.rstrip("/"), account, target.model)
        self._limits = limits
        self._time = time
        self.by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Limiter] = WeakKeyDictionary()
        self._latest: tuple[ref[asyncio.AbstractEventLoop], Limiter] | None = None

    def __call__(self) -> Limiter:
        """Return the running loop's limiter."""
        loop, latest = asyncio.get_running_loop(), self._latest
        if latest is not None and latest[0]() is loop:
            return latest[1]
        limiter = self.by_loop.get(loop)
        if limiter is None:
            if self._time is None:
                limiter = shared_limiter(self._key, **self._limits)
            else:
                limiter = Limiter(clock=self._time[0], sleep=self._time[1], **self._limits)
            self.by_loop[loop] = limiter
        self._latest = ref(loop), limiter
        return limiter


_KEPT = 240.0  # seconds; providers keep a prefix for five minutes after its last use
_PATIENCE = 60.0  # the maximum seconds that a call waits for the first one
_MOST = 256


class Openings:
    """Lets one of several calls with the same prefix go first. One object serves every event loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._warm: dict[bytes, float] = {}  # when a prefix was last used
        self._leading: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[bytes, asyncio.Event]] = WeakKeyDictionary()

    async def enter(self, opening: bytes, timeout: float | None) -> bool:
        """Wait for the call that goes first, if there is one; return True if it is this one, which calls `leave`."""
        now = self._clock()
        if now - self._warm.get(opening, -_KEPT) < _KEPT:
            self._warm[opening] = now
            return False
        leading = self._leading.setdefault(asyncio.get_running_loop(), {})
        first = leading.get(opening)
        if first is None:
            leading[opening] = asyncio.Event()
            return True
        try:
            async with asyncio.timeout(_PATIENCE if timeout is None else min(timeout, _PATIENCE)):
                await first.wait()
        except TimeoutError:
            pass  # better written twice than late
        return False

    def leave(self, opening: bytes) -> None:
        """Release the others: the first call has been answered, or has failed and would fail for them as well."""
        first = self._leading.get(asyncio.get_running_loop(), {}).pop(opening, None)
        if first is not None:
            first.set()
        self._warm[opening] = self._clock()
        if len(self._warm) > _MOST:
            del self._warm[min(self._warm, key=self._warm.__getitem__)]
