"""Paces: when the next request may go, as arithmetic over times. No I/O, no clock of its own.

`Pace` keeps a known rate. `LearnedPace` finds an unknown one from the 429s of a server whose limit is a bucket of
size B refilled at r per second, of which neither is known:

* Sent faster than r, the bucket runs empty after T seconds, and until then n = B + r T requests were accepted. Two such
  stretches of different length give both unknowns: r is the slope between the two points (T, n).
* n / (T + wait), with the wait that the server asked for, is a rate that it has shown to sustain. The second stretch
  begins there, after a burst of what the wait refilled, and doubles quickly, so that the bucket runs empty again soon
  and never overflows, which would hide a part of r.
* Once the slope is known, the pace stays just below it and rises again with the cube of the time since, as TCP's CUBIC
  does: hardly at first, where the limit was found, faster later, in case it was raised or guessed too low.
"""

from __future__ import annotations

from math import inf

from msgspec import Struct

_MARGIN = 0.97  # of the rate found; the rest is for requests that overtake one another
_REFILLED = 0.8  # of what the wait is thought to have refilled
_DOUBT = 5.0  # how far above the sustained rate the true one may lie
_FOUND_PERIOD = 60.0  # seconds in which a rate that was found doubles
_SLACK = 0.02  # seconds that a late timer may make up for
_SHORTEST = 0.05  # seconds by which two stretches must differ for their slope to mean anything


class Pace:
    """At most `rate` per second, with bursts of `burst`; a cost above the burst is paid off afterwards."""

    def __init__(self, rate: float = inf, burst: float = 1.0) -> None:
        self._seconds_each = 1.0 / rate
        self._burst = burst
        self._full_at = -inf

    @classmethod
    def per_minute(cls, limit: float | None) -> Pace:
        """Keep a limit in every window of 60 s: bursts are a second's worth, the rate makes up for them.

        >>> pace = Pace.per_minute(60)
        >>> pace.take(1, now=0.0)
        >>> pace.ready_at()
        1.0
        """
        if limit is None:
            return cls()
        burst = max(1.0, limit / 60)
        return cls((limit - burst + 1) / 60, burst)

    def ready_at(self, cost: float = 1.0) -> float:
        """When `cost` may be spent."""
        return self._full_at - (self._burst - min(cost, self._burst)) * self._seconds_each

    def take(self, cost: float, now: float) -> None:
        """Spend `cost` now; a negative one is given back."""
        self._full_at = max(self._full_at, now) + cost * self._seconds_each


class Stretch(Struct):
    """The requests between two pauses: when the first was sent, when the last refused one, how many were accepted."""

    start: float = inf
    end: float = -inf
    accepted: int = 0
    wait: float = 0.0


class Admission(Struct, frozen=True):
    """The permission to send one request now."""

    stretch: Stretch
    at: float
    tokens: float


class LearnedPace:
    """No limit until the first 429, then the server's rate as far as it is known."""

    def __init__(self) -> None:
        self.rate = inf
        self.ready_at = -inf
        self._period = _FOUND_PERIOD
        self._power = 3
        self._first_burst = self._burst = 0
        self._since = 0.0
        self._stretch = Stretch()
        self._ended: Stretch | None = None
        self._shortest: tuple[float, int] | None = None

    def take(self, now: float, tokens: float = 0.0) -> Admission:
        """Send one request now."""
        stretch = self._stretch
        if stretch.start == inf:
            stretch.start = now
            if self._ended is not None:  # only now have its last answers come in
                self._learn(self._ended)
                self._ended, self._since = None, now
        if self.rate != inf:
            self._space(now)
        return Admission(stretch, now, tokens)

    def _space(self, now: float) -> None:
        if self._burst > 0:
            self._burst -= 1
            self.ready_at = now
        else:
            growth = ((now - self._since) / self._period) ** self._power
            self.ready_at = max(self.ready_at, now - _SLACK) + 1.0 / (self.rate * 2.0 ** min(growth, 50.0))

    def rejected(self, admission: Admission, wait: float) -> None:
        """Take a 429 that asked for a wait of so many seconds; the first of a stretch ends it."""
        stretch = admission.stretch
        stretch.end = max(stretch.end, admission.at)
        stretch.wait = max(stretch.wait, wait)
        if stretch is self._stretch:
            self._ended, self._stretch = stretch, Stretch()

    def _learn(self, ended: Stretch) -> None:
        """Set the pace of the stretch that begins now from the one that ended."""
        length, count, wait = ended.end - ended.start, ended.accepted, max(ended.wait, 0.001)
        sustained = max(count, 1) / (length + wait)
        if self.rate != inf and length < _SHORTEST:  # refused within its first burst, which thus was too large
            self._first_burst = self._burst = min(self._first_burst // 2, int(_REFILLED * count))
            self.rate = min(self.rate, sustained) if self._power == 1 else self.rate / (1 if count else 2)
            return
        slope = self._slope(length, count)
        found = slope > sustained
        self.rate = slope * _MARGIN if found else sustained
        self._power = 3 if found else 1
        self._period = _FOUND_PERIOD if found else min(max(wait / 8, 2 / sustained), 15.0)
        refill = self.rate if found else _DOUBT * self.rate
        self._first_burst = self._burst = int(_REFILLED * min(max(count - refill * length, 0.0), self.rate * wait))
        if self._shortest is None or length < self._shortest[0]:
            self._shortest = (length, count)

    def _slope(self, length: float, count: int) -> float:
        if self._shortest is None or length - self._shortest[0] < _SHORTEST:
            return 0.0
        return (count - self._shortest[1]) / (length - self._shortest[0])
