"""What a provider's headers say about its rate limits, as pure functions.

Two families: OpenAI's `x-ratelimit-remaining-requests` (Groq, Azure, Together; Mistral and others append a period) and
Anthropic's `anthropic-ratelimit-requests-remaining`. Both describe a bucket that refills continuously, so what is
missing now comes back at (limit - remaining) / reset per second.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import datetime

from msgspec import Struct

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_OPENAI = "x-ratelimit-{}-{}"
_ANTHROPIC = "anthropic-ratelimit-{1}-{0}"
_FAMILIES = {
    "requests": (
        (_OPENAI, "requests"),
        (_ANTHROPIC, "requests"),
        (_OPENAI, "req-minute"),
        (_OPENAI, "requests-minute"),
    ),
    "tokens": ((_OPENAI, "tokens"), (_ANTHROPIC, "tokens"), (_OPENAI, "tokens-minute")),
}
_NAMES = {
    what: tuple(tuple(shape.format(part, unit) for part in ("remaining", "limit", "reset")) for shape, unit in families)
    for what, families in _FAMILIES.items()
}


class Headroom(Struct, frozen=True):
    """How many more are allowed now, and how many seconds bring one more."""

    remaining: float
    seconds_each: float


def headroom(headers: Mapping[str, str], what: str, *, now: float | None = None) -> Headroom | None:
    """Return what the headers say about "requests" or "tokens", None where they say nothing that can be read.

    `now` is Unix time, for resets given as a date.

    >>> headroom({"x-ratelimit-remaining-requests": "10", "x-ratelimit-limit-requests": "60",
    ...           "x-ratelimit-reset-requests": "25s"}, "requests")
    Headroom(remaining=10.0, seconds_each=0.5)
    """
    for remaining_name, limit_name, reset_name in _NAMES[what]:
        said = headers.get(remaining_name)
        if said is None:
            continue
        try:
            remaining = float(said)
        except ValueError:
            return None
        reset = seconds(headers.get(reset_name, ""), now=now)
        missing = _number(headers.get(limit_name, "")) - remaining
        return Headroom(remaining, (60.0 if reset is None else reset) / max(missing, 1.0))
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
    if bare > 1e12:  # a Unix time in milliseconds
        return max(0.0, bare / 1e3 - now)
    return max(0.0, bare - now) if bare > 1e9 else bare


def _until(text: str, now: float) -> float | None:
    try:
        then = datetime.fromisoformat(text)
    except ValueError:
        return None
    return max(0.0, then.timestamp() - now) if then.tzinfo else None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
