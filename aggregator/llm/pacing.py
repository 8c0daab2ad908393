"""The rate of requests as pure functions of the time: fixed limits, and a pace learned from a server's 429s.

A 429 has two kinds of cause. A token bucket refuses requests that come too fast: it needs a pace, which is learned from
the number of requests that it accepts between two 429s. A server that refuses at random (overload, a pool shared with
others, a cheap service tier) does so at any pace: slowing down only wastes time, and each refused request waits
separately. `Pacing` distinguishes them by the server's behaviour, and keeps testing its hypothesis.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from msgspec import Struct

_MARGIN = 0.97  # of the rate found; the rest is for requests that overtake each other
_REFILLED = 0.8  # of the tokens that the wait should have refilled
_DOUBT = 5.0  # how far above the sustained rate the true one may lie
_FOUND_PERIOD = 60.0  # seconds in which a found rate doubles
_SLACK = 0.02  # seconds that a late timer may make up for
_WINDOW = 60  # number of remembered outcomes
_AFTER, _MOSTLY = 8, 0.8  # accepted after a 429, and their part of all after it, that no empty bucket accepts
_PAUSES, _MANY = 4, 0.12  # pauses in the window of a paced server, refusals of an unpaced one, that start a trial
_FREE = 4.0  # times the throughput: a pace that delays nothing
_FLOOD, _MORE = 0.6, 0.3  # refused in the window by an unpaced server, beyond which it is paced again
_TRIAL, _CONTRADICTIONS = 60, 2  # accepted requests that confirm a bucket at most, refused ones that contradict it
_SHORTEST = 0.05  # seconds by which two stretches must differ for their slope to be significant


# ---- the pace


class Pace:
    """At most `rate` per second, with bursts of `burst`; a cost above the burst is paid off afterwards."""

    def __init__(self, rate: float = inf, burst: float = 1.0) -> None:
        self._seconds_each = 1.0 / rate
        self._burst = burst
        self._full_at = -inf

    @classmethod
    def per_minute(cls, limit: float | None) -> Pace:
        """Keep a limit in every window of 60 s: bursts are a second's worth, and the rate is reduced by them.

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
        """Return the time at which `cost` may be spent."""
        spare = self._burst - cost
        return self._full_at - spare * self._seconds_each if spare > 0 else self._full_at

    def take(self, cost: float, now: float) -> None:
        """Spend `cost` now; a negative one is returned."""
        self._full_at = max(self._full_at, now) + cost * self._seconds_each


class Stretch(Struct, gc=False):
    """The requests between two pauses: the times of the first and of the last refused one, the number of accepted ones.

    `refused_at` is the position of the first refused one, in the order of sending.
    """

    start: float = inf
    end: float = -inf
    sent: int = 0
    accepted: int = 0
    wait: float = 0.0
    refused_at: float = inf


class Admission(Struct, frozen=True, gc=False):
    """The permission to send one request now."""

    stretch: Stretch
    at: float
    tokens: float
    place: int = 0
    is_free: bool = False
    trial: Trial | None = None


# ---- learning from 429s


class LearnedPace:
    """No limit until the first 429, then the server's rate as far as it is known."""

    def __init__(self, rate: float = inf, now: float = 0.0) -> None:
        self.rate = rate
        self.ready_at = -inf
        self._floor = 0.0
        self._period = _FOUND_PERIOD
        self._power = 3
        self._first_burst = self._burst = 0
        self._since = now
        self._stretch = Stretch()
        self._ended: Stretch | None = None
        self._shortest: tuple[float, int] | None = None

    def take(self, now: float, tokens: float = 0.0, *, free_above: float = inf) -> Admission:
        """Send one request now, without delay if no pace is known, or one above this number of requests per second."""
        stretch = self._stretch
        if stretch.start == inf:
            stretch.start = now
            if self._ended is not None:  # the last answers have arrived only now
                self._learn(self._ended)
                self.rate = max(self.rate, self._floor)
                self._ended, self._since = None, now
        is_free = self.rate == inf or self._space(now) > free_above > 0
        stretch.sent += 1
        return Admission(stretch, now, tokens, stretch.sent, is_free)

    def _space(self, now: float) -> float:
        """Delay the next request; return the pace of this one."""
        if self._burst > 0:
            self._burst -= 1
            self.ready_at = now
            return self.rate
        growth = ((now - self._since) / self._period) ** self._power
        pace: float = self.rate * 2.0 ** min(growth, 50.0)
        self.ready_at = max(self.ready_at, now - _SLACK) + 1.0 / pace
        return pace

    def rejected(self, admission: Admission, wait: float, floor: float = 0.0) -> bool:
        """Record a 429 with a wait in seconds; return True if it ended the stretch, as the first does.

        The pace never falls below `floor` requests a second.
        """
        self._floor = floor
        stretch = admission.stretch
        stretch.end = max(stretch.end, admission.at)
        stretch.refused_at = min(stretch.refused_at, admission.place)
        stretch.wait = max(stretch.wait, wait)
        if stretch is not self._stretch:
            return False
        self._ended, self._stretch = stretch, Stretch()
        return True

    def _learn(self, ended: Stretch) -> None:
        """Set the pace of the next stretch from the one that ended."""
        length, count, wait = ended.end - ended.start, ended.accepted, max(ended.wait, 0.001)
        sustained = max(count, 1) / (length + wait)
        if self.rate != inf and length < _SHORTEST:  # refused within its first burst, which was therefore too large
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


class Trial(Struct):
    """A hypothesis under test: the numbers of requests accepted and refused at half the pace.

    `enough` accepted ones confirm a token bucket.
    """

    rate: float
    enough: int
    accepted: int = 0
    refused: int = 0


class Recent:
    """The last outcomes: the number of refused requests, and the rate of accepted ones."""

    def __init__(self) -> None:
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=_WINDOW)

    def __len__(self) -> int:
        return len(self._outcomes)

    def add(self, now: float, *, accepted: bool) -> None:
        """Add one outcome."""
        self._outcomes.append((now, accepted))

    def refused(self) -> float:
        """Return the refused fraction."""
        return sum(not accepted for _, accepted in self._outcomes) / max(len(self._outcomes), 1)

    def throughput(self, until: float) -> float:
        """Return the accepted requests per second until then, including pauses; 0 while too few are known."""
        length = until - self._outcomes[0][0] if len(self._outcomes) >= _WINDOW / 4 else 0.0
        return sum(accepted for _, accepted in self._outcomes) / length if length > 0 else 0.0


# ---- the pace of one server


class Pacing:
    """Paces requests while 429s look like a token bucket's, and does not while they do not depend on the rate.

    * Undelayed requests that were mostly accepted *after* a 429 did not meet an empty bucket.
    * If pauses do not end the 429s, half the pace is tried for a while: a bucket then refuses none.
    * If an unpaced server refuses most requests, it is treated as a bucket again.
    """

    def __init__(self) -> None:
        self.is_bucket = True
        self._learned = LearnedPace()
        self._paused_until = -inf
        self._throughput = 0.0  # at the last 429, its wait included
        self._after = [0, 0]  # undelayed requests after a stretch's first 429: refused, accepted
        self._recent = Recent()
        self._pauses: deque[int] = deque(maxlen=_PAUSES)  # the numbers of the outcomes that ended a paced stretch
        self.outcomes, self._gap = 0, 2 * _WINDOW  # outcomes since the first 429
        self._next_trial: float = 0
        self._flood = _FLOOD
        self._trial: Trial | None = None
        self._trial_ready = -inf

    @property
    def rate(self) -> float:
        """The allowed requests per second now, without growth; infinity for no limit."""
        if self._trial is not None:
            return self._trial.rate
        return self._learned.rate if self.is_bucket else inf

    @property
    def ready_at(self) -> float:
        """Return the time at which the next request may be sent."""
        if self._trial is not None:
            return self._trial_ready
        return max(self._learned.ready_at, self._paused_until) if self.is_bucket else -inf

    def take(self, now: float, tokens: float = 0.0) -> Admission:
        """Send one request now."""
        if self._trial is not None:
            self._trial_ready = max(self._trial_ready, now) + 1.0 / self._trial.rate
            return Admission(Stretch(), now, tokens, trial=self._trial)
        if not self.is_bucket:
            return Admission(Stretch(), now, tokens)
        return self._learned.take(now, tokens, free_above=_FREE * self._throughput)

    def accepted(self, admission: Admission, clock: Callable[[], float]) -> None:
        """Record any answer but a 429."""
        admission.stretch.accepted += 1
        if self.outcomes:  # nothing is kept before the first 429
            self._keep(admission, clock(), accepted=True)

    def rejected(self, admission: Admission, wait: float, now: float) -> bool:
        """Record a 429 that asks for `wait` seconds; return True if all calls must wait, not only the refused one."""
        was_paced = self._learned.rate != inf
        self._keep(admission, now, accepted=False)
        if self._trial is not None or not self.is_bucket:
            return False
        self._throughput = self._recent.throughput(now + wait)
        self._paused_until = max(self._paused_until, now + wait)
        if self._learned.rejected(admission, wait, self._throughput) and was_paced:
            self._pauses.append(self.outcomes)
        return True

    def _keep(self, admission: Admission, now: float, *, accepted: bool) -> None:
        """Count an outcome and draw the conclusion."""
        self._recent.add(now, accepted=accepted)
        self.outcomes += 1
        trial = self._trial
        if trial is not None:
            if admission.trial is trial:
                self._judge(trial, now, accepted=accepted)
        elif self.is_bucket and admission.is_free and admission.place > admission.stretch.refused_at:
            self._after[accepted] += 1
            if self._after[True] >= max(_AFTER, _MOSTLY * sum(self._after)):
                self._leave_alone()
        elif (
            not accepted
            and not self.is_bucket
            and len(self._recent) == _WINDOW
            and self._recent.refused() > self._flood
        ):
            self._pace(self._recent.throughput(now) or inf, now)
            self._next_trial = self.outcomes
        elif not accepted and self._is_suspicious() and (throughput := self._recent.throughput(now)):
            enough = min(max(int(6 / self._recent.refused()), 12), _TRIAL)
            self._trial, self._trial_ready = Trial(throughput / 2, enough), now

    def _judge(self, trial: Trial, now: float, *, accepted: bool) -> None:
        """Count an outcome of a trial, and end it once it is decided."""
        trial.accepted, trial.refused = trial.accepted + accepted, trial.refused + (not accepted)
        if trial.refused >= _CONTRADICTIONS:
            self._flood = max(_FLOOD, trial.refused / (trial.accepted + trial.refused) + _MORE)
            self._next_trial = inf  # the question is decided, until a flood reopens it
            self._leave_alone()
        elif trial.accepted >= trial.enough:
            self._next_trial, self._gap = self.outcomes + self._gap, 2 * self._gap
            self._pace(2 * trial.rate, now)

    def _is_suspicious(self) -> bool:
        """Return True if the hypothesis is worth a trial: the pauses of a bucket do not help, or a pace might."""
        if len(self._recent) < _WINDOW or self.outcomes < self._next_trial:
            return False
        if not self.is_bucket:
            return self._recent.refused() > _MANY
        return len(self._pauses) == _PAUSES and self.outcomes - self._pauses[0] <= _WINDOW

    def _leave_alone(self) -> None:
        self.is_bucket, self._trial, self._paused_until = False, None, -inf
        self._recent = Recent()

    def _pace(self, rate: float, now: float) -> None:
        self.is_bucket, self._trial, self._after = True, None, [0, 0]
        self._learned = LearnedPace(rate, now)
        self._recent = Recent()
