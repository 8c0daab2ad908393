"""How fast calls may be sent: concurrency, requests and tokens per minute, and what 429s and headers teach."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator
from math import inf
from random import Random
from typing import Any

import pytest
from llm_fakes import VirtualLoop, VirtualTime

from aggregator.errors import APITimeoutError, ConfigError
from aggregator.llm.codecs.failures import headroom, seconds
from aggregator.llm.limiter import Limiter, shared_limiter
from aggregator.llm.names import resolve
from aggregator.llm.pacing import Pace

CODEC = resolve("openai/gpt-4o-mini", env={}).codec


@pytest.fixture
def run() -> Iterator[Callable[[Callable[[], Awaitable[Any]]], Any]]:
    """Run in virtual time: timers fire in order, at once."""
    loop = VirtualLoop()

    async def shielded(main: Callable[[], Awaitable[Any]]) -> Any:
        return await main()

    yield lambda main: loop.run_until_complete(shielded(main))
    loop.close()


class Bucket:
    """A server that allows `rate` requests a second, `burst` at once, and refuses the others for `wait` seconds."""

    def __init__(self, rate: float, burst: float, wait: float = 1.0) -> None:
        self.rate, self.burst, self.wait = rate, burst, wait
        self.level, self.at, self.requests = burst, 0.0, 0

    def lets_in(self) -> bool:
        now = asyncio.get_running_loop().time()
        self.requests += 1
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Chance:
    """A server that refuses a fraction of all requests at random."""

    def __init__(self, refused: float, wait: float = 0.5, seed: int = 1) -> None:
        self.refused, self.wait, self.requests, self._random = refused, wait, 0, Random(seed)

    def lets_in(self) -> bool:
        self.requests += 1
        return self._random.random() >= self.refused


async def send_all(limiter: Limiter, bucket: Bucket | Chance, calls: int, latency: float, attempts: int) -> int:
    """Push calls through limiter and bucket; return how many failed `attempts` times."""
    failed = 0

    async def one() -> None:
        nonlocal failed
        await limiter.enter()
        try:
            for _ in range(attempts):
                admission = await limiter.admit()
                await asyncio.sleep(latency / 2)
                accepted = bucket.lets_in()
                await asyncio.sleep(latency / 2)
                if accepted:
                    limiter.accepted(admission)
                    return
                await asyncio.sleep(limiter.rejected(admission, bucket.wait))
            failed += 1
        finally:
            limiter.leave()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(calls):
            tasks.create_task(one())
    return failed


@pytest.mark.requirement(
    "client 5: adaptive",
    "figure: bucket 100/s, burst 20, 400 calls at 64: 0 failed, <= 480 requests, <= 6 s",
)
@pytest.mark.parametrize("latency", [0.001, 0.005, 0.02, 0.05])
def test_an_unknown_limit_is_found_from_its_429s(run: Any, latency: float) -> None:
    """Bucket 100/s, burst 20, 400 calls at 64, 429 with Retry-After 1 and no headers: none fails, few are refused."""

    async def main() -> tuple[int, int, float]:
        loop = asyncio.get_running_loop()
        bucket = Bucket(100, 20)
        limiter = Limiter(max_concurrency=64, clock=loop.time)
        failed = await send_all(limiter, bucket, 400, latency, attempts=3)
        return failed, bucket.requests, loop.time()

    failed, requests, took = run(main)
    assert failed == 0
    assert requests <= 480
    assert took <= 6.0


@pytest.mark.parametrize(("rate", "burst", "calls"), [(10, 5, 200), (1000, 100, 3000), (100, 20, 1500)])
def test_other_limits_are_found_too(run: Any, rate: float, burst: float, calls: int) -> None:
    """For any limit nothing fails, and at most two in ten requests, or one burst, are refused."""

    async def main() -> tuple[int, int, float]:
        loop = asyncio.get_running_loop()
        bucket = Bucket(rate, burst)
        failed = await send_all(Limiter(clock=loop.time), bucket, calls, 0.005, attempts=3)
        return failed, bucket.requests, loop.time()

    failed, requests, took = run(main)
    assert failed == 0
    assert requests <= calls * 1.2 + 64
    assert took <= 2 * calls / rate + 5


def time_of(
    run: Any, server: Bucket | Chance, calls: int, places: int, latency: float, **options: Any
) -> tuple[float, int]:
    """Return how long the calls take and how many fail, with six attempts each."""

    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        limiter, started = Limiter(max_concurrency=places, clock=loop.time, **options), loop.time()
        lost = await send_all(limiter, server, calls, latency, attempts=6)
        return loop.time() - started, lost

    return run(main)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("refused", "wait"), [(0.01, 0.5), (0.03, 0.5), (0.08, 0.5), (0.05, 2.0), (0.2, 0.5)])
@pytest.mark.parametrize(("places", "latency"), [(256, 0.05), (64, 1.0), (64, 0.2)])
def test_429s_at_random_throttled_the_run(run: Any, refused: float, wait: float, places: int, latency: float) -> None:
    """Refusals that do not depend on the pace delay only their own calls, after a short test."""
    alone, _ = time_of(run, Chance(refused, wait), 2000, places, latency, adaptive=False)
    took, lost = time_of(run, Chance(refused, wait), 2000, places, latency)
    assert lost <= 1
    assert took <= 1.1 * alone + 2 * wait


@pytest.mark.parametrize("refused", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("places", [1, 2, 8])
def test_low_concurrency_and_429s_at_random(run: Any, refused: float, places: int) -> None:
    """With few calls in flight there is no burst to judge by: a trial shows that half the pace does not help."""
    alone, _ = time_of(run, Chance(refused), 1500, places, 0.05, adaptive=False)
    took, _ = time_of(run, Chance(refused), 1500, places, 0.05)
    assert took <= 2 * alone


def test_a_server_that_begins_to_refuse_by_rate(run: Any) -> None:
    """If a server that refused at random starts to limit the rate, few of the later requests are refused."""

    async def main() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        limiter, bucket = Limiter(max_concurrency=64, clock=loop.time), Bucket(100, 20)
        await send_all(limiter, Chance(0.08), 1000, 0.05, attempts=6)
        assert limiter.rate == inf
        return await send_all(limiter, bucket, 1500, 0.05, attempts=6), bucket.requests

    lost, requests = run(main)
    assert lost == 0
    assert requests <= 1500 * 1.2 + 2 * 64


def test_without_adapting_a_429_delays_its_own_call_alone(run: Any) -> None:
    """If adaptation is off, no other call waits and no pace is learned."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        limiter = Limiter(clock=loop.time, adaptive=False)
        assert limiter.rejected(await limiter.admit(), 5.0) == 5.0
        await limiter.admit()
        assert limiter.rate == inf
        return loop.time()

    assert run(main) == 0.0


@pytest.mark.requirement("client 5: a 429 pauses all callers")
def test_a_429_pauses_all_callers(run: Any) -> None:
    """No call is sent during the server's wait; the pause ends on time."""

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        limiter = Limiter(clock=loop.time)
        limiter.rejected(await limiter.admit(), 5.0)
        sent = []

        async def other() -> None:
            await limiter.admit()
            sent.append(loop.time())

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(other())
        return sent

    assert min(run(main)) == pytest.approx(5.0, abs=0.001)


@pytest.mark.requirement("built 5: concurrency")
def test_places_are_first_come_first_served(run: Any) -> None:
    """At most `max_concurrency` calls are in flight; the others wait in order."""

    async def main() -> tuple[list[int], int]:
        limiter = Limiter(max_concurrency=2)
        order: list[int] = []
        most = 0

        async def one(number: int) -> None:
            nonlocal most
            await limiter.enter()
            order.append(number)
            most = max(most, limiter.in_flight)
            await asyncio.sleep(1)
            limiter.leave()

        async with asyncio.TaskGroup() as tasks:
            for number in range(7):
                tasks.create_task(one(number))
        return order, most

    assert run(main) == (list(range(7)), 2)


async def test_a_cancelled_wait_passes_its_place_on() -> None:
    """Cancelling a call that waits, or has just got a place, loses no place."""
    limiter = Limiter(max_concurrency=1)
    await limiter.enter()
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(limiter.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        limiter.leave()  # the place goes to the second call, which is cancelled before it runs
        waiting[1].cancel()
    await waiting[2]
    limiter.leave()
    assert limiter.in_flight == 0


async def test_waiting_ends_at_the_deadline() -> None:
    """The error of a call that times out in the queue states what it waited for."""
    limiter = Limiter(max_concurrency=1)
    await limiter.enter()
    with pytest.raises(APITimeoutError, match="1 calls are in flight"):
        await limiter.enter(0.01)
    limiter.rejected(await limiter.admit(), 60.0)
    with pytest.raises(APITimeoutError, match="rate limits leave no room"):
        await limiter.admit(0.0, 0.01)
    assert limiter.in_flight == 1


@pytest.mark.requirement("client 5: requests per minute")
@pytest.mark.parametrize("limit", [1, 7, 60, 600, 10_000])
def test_requests_per_minute_hold_in_every_window(limit: int) -> None:
    """No window of 60 s has more, and a busy client gets nearly all of them."""
    pace, now, sent = Pace.per_minute(limit), 0.0, []
    while now < 300:
        now = max(now, pace.ready_at())
        pace.take(1.0, now)
        sent.append(now)
    windows = [bisect_left(sent, first + 60 - 1e-6) - i for i, first in enumerate(sent)]
    assert max(windows) <= limit
    assert len(sent) >= 0.95 * limit * 300 / 60


@pytest.mark.requirement("client 5: tokens per minute")
async def test_tokens_per_minute() -> None:
    """Expected tokens are reserved and corrected when the answer states the real number."""
    time = VirtualTime()
    limiter = Limiter(tpm=6000, clock=time.clock, sleep=time.sleep)
    first = await limiter.admit(1100.0)
    await limiter.admit(100.0)
    assert sum(time.slept) == pytest.approx(11.0, abs=1.1)
    time.slept.clear()
    limiter.used(first, 100.0)  # a thousand tokens fewer than reserved
    await limiter.admit(100.0)
    assert sum(time.slept) == 0.0


@pytest.mark.requirement("client 5: shared per (base_url, key, model)")
async def test_the_strictest_limits_of_an_account_apply() -> None:
    """Clients of one (base_url, key, model) share a limiter; others do not."""
    first = shared_limiter(("http://a", "key", "m"), max_concurrency=64, rpm=None, tpm=None)
    second = shared_limiter(("http://a", "key", "m"), max_concurrency=8, rpm=100, tpm=None)
    assert first is second
    assert (first.max_concurrency, first.rpm) == (8, 100)
    assert shared_limiter(("http://a", "other", "m"), max_concurrency=64, rpm=None, tpm=None) is not first


@pytest.mark.parametrize(("name", "value"), [("max_concurrency", 0), ("rpm", 0), ("tpm", -5)])
def test_limits_that_let_nothing_through_are_refused(name: str, value: Any) -> None:
    """Zero does not mean "no limit"."""
    with pytest.raises(ConfigError, match=f"Expected {name} > 0"):
        Limiter(**{name: value})


NOTHING_LEFT = {
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-reset-requests": "60s",
}
PLENTY = {**NOTHING_LEFT, "x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1s"}


@pytest.mark.requirement("client 5: rate-limit headers hold back")
async def test_rate_limit_headers_delay_the_next_request() -> None:
    """If nothing is left, the next request waits until the server's bucket has refilled one."""
    time = VirtualTime()
    limiter = Limiter(clock=time.clock, sleep=time.sleep)
    await limiter.enter()
    limiter.apply_headers(await limiter.admit(), NOTHING_LEFT, CODEC)
    await limiter.admit()
    assert sum(time.slept) == pytest.approx(1.0)


async def test_headers_with_room_delay_nothing() -> None:
    """If enough is left for the calls in flight, there is no wait."""
    time = VirtualTime()
    limiter = Limiter(clock=time.clock, sleep=time.sleep)
    await limiter.enter()
    limiter.apply_headers(await limiter.admit(), PLENTY, CODEC)
    await limiter.admit()
    assert time.slept == []


@pytest.mark.requirement("client 5: in every family and every form")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6ms", 0.006), ("12.967s", 12.967), ("17.399999999s", 17.399999999), ("0s", 0.0), ("1m30s", 90.0),
        ("2m59.56s", 179.56), ("1h2m", 3720.0), ("1", 1.0), ("500", 500.0), ("1700000060", 60.0),
        ("1700000060000", 60.0), ("2023-11-14T22:14:20Z", 60.0), ("later", None), ("", None),
    ],
)  # fmt: skip
def test_every_recorded_form_of_a_reset_is_read(text: str, expected: float | None) -> None:
    """Durations, bare seconds, Unix times and dates, as recorded from providers."""
    found = seconds(text, now=1700000000)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.requirement("client 5: in every family and every form")
@pytest.mark.parametrize("family", ["requests", "tokens"])
@pytest.mark.parametrize(
    "names",
    ["x-ratelimit-{part}-{what}", "anthropic-ratelimit-{what}-{part}", "x-ratelimit-{part}-{what}-minute"],
)
def test_families_of_header_names(family: str, names: str) -> None:
    """OpenAI's, Anthropic's and Mistral's header names are equivalent."""
    values = {"remaining": "4", "limit": "10", "reset": "12s"}
    headers = {names.format(what=family, part=part): value for part, value in values.items()}
    codecs = (CODEC, resolve("anthropic/m", env={}).codec)
    (found,) = [left for codec in codecs if (left := headroom(headers, getattr(codec, family)))]
    assert (found.remaining, found.seconds_each) == (4.0, 2.0)


def test_invalid_headers_are_ignored() -> None:
    """A redacted number in a recording delays nothing."""
    assert headroom({"x-ratelimit-remaining-tokens": "X-RATELIMIT-REMAINING-TOKENS-XXX"}, CODEC.tokens) is None
    assert headroom({}, CODEC.requests) is None
