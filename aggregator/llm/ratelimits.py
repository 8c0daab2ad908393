"""What a provider's headers say about its rate limits, as pure functions; the names are the codec's.

They describe a bucket that refills continuously, so what is missing now comes back at (limit - remaining) / reset per
second. A server that names no reset (Azure, Mistral) states its limits per minute.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from math import isfinite

from msgspec import Struct

from aggregator.llm.calls import RateHeaders

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Headroom(Struct, frozen=True):
    """How many more are allowed now, and how many seconds bring one more."""

    remaining: float
    seconds_each: float


def headroom(headers: Mapping[str, str], names: Iterable[RateHeaders], *, now: float | None = None) -> Headroom | None:
    """Return what the headers say under the first of these names, None if they say nothing that can be read.

    `now` is Unix time, for resets given as a date.

    >>> names = [RateHeaders("x-ratelimit-remaining", "x-ratelimit-limit", "x-ratelimit-reset")]
    >>> headroom({"x-ratelimit-remaining": "10", "x-ratelimit-limit": "60", "x-ratelimit-reset": "25s"}, names)
    Headroom(remaining=10.0, seconds_each=0.5)
    """
    for name in names:
        if name.remaining not in headers:
            continue
        remaining, limit = _number(headers[name.remaining]), _number(headers.get(name.limit, ""))
        if remaining is None:
            return None
        reset = seconds(headers.get(name.reset, ""), now=now)
        if reset is not None:
            return Headroom(remaining, reset / max((limit or 0.0) - remaining, 1.0))
        return Headroom(remaining, 60.0 / limit) if limit else None
    return None


def reset_wait(headers: Mapping[str, str], names: Iterable[RateHeaders], *, now: float | None = None) -> float | None:
    """Return the seconds until a limit with nothing left is full again; None if the headers name none.

    >>> names = [RateHeaders("x-ratelimit-remaining", "x-ratelimit-limit", "x-ratelimit-reset")]
    >>> reset_wait({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000030000"}, names, now=1700000000)
    30.0
    """
    for name in names:
        if name.reset and _number(headers.get(name.remaining, "")) == 0:
            wait = seconds(headers.get(name.reset, ""), now=now)
            if wait:
                return wait
    return None


def seconds(text: str, *, now: float | None = None) -> float | None:
    """Read a time until reset: `6ms`, `12.967s`, `1m30s`, bare seconds, a Unix time (also in ms) or a date of RFC 3339.

    >>> seconds("1m30s"), seconds("6ms"), seconds("500"), seconds("1970-01-01T00:01:00Z", now=0), seconds("soon")
    (90.0, 0.006, 500.0, 60.0, None)
    """
    text = text.strip()
    found = _DURATION.findall(text)
    if found and "".join(a + b for a, b in found) == text:
        return sum(float(amount) * _SECONDS[unit] for amount, unit in found)
    now = time.time() if now is None else now
    try:
        bare = float(text)
    except ValueError:
        return _until(text, now)
    if not isfinite(bare):
        return None
    if bare > 1e12:  # a Unix time in milliseconds
        return max(0.0, bare / 1e3 - now)
    return max(0.0, bare - now) if bare > 1e9 else bare


def _until(text: str, now: float) -> float | None:
    try:
        then = datetime.fromisoformat(text)
        return max(0.0, then.timestamp() - now) if then.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None
