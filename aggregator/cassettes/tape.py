"""The tape: (key, lineage, ticket) -> recorded answers, in one dictionary lookup.

A *slot* is one logical call: it takes its ticket when it is issued, in record and replay alike, so that the
order in which answers arrive never matters. A slot's *attempts* are the answers it got in turn (a 429, then
a 200), error statuses and failed connections included. No function here awaits.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Literal, Protocol

from aggregator.cassettes.exchanges import Exchange, Facts
from aggregator.cassettes.keys import Ignore, raw_key, request_key
from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.cassettes.mismatch import Asked, explain_miss
from aggregator.cassettes.redaction import needles_for, redact_line, redact_request, redact_url
from aggregator.cassettes.rows import Row
from aggregator.cassettes.timing import Faults, Latency, latency_scale
from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    CassetteError,
    CassetteMissError,
    CassetteWarning,
    SecretLeakError,
)
from aggregator.records import HTTPReply, HTTPRequest, Role, Usage

_EXPLAINED = 5  # misses that get a search for the nearest request, which takes a moment in a large cassette

LineageRule = Literal["strict", "prefer"]

_TAPE: ContextVar[Tape | None] = ContextVar("aggregator_tape", default=None)

current_tape = _TAPE.get
"""Return the tape of this context, None where no cassette is open."""


class Sink(Protocol):
    """Where recorded lines go: a journal."""

    def append(self, line: bytes) -> None:
        """Write one line, whole or not at all; raises CassetteError."""
        ...


class _Pool:
    """Recorded answers to identical requests of one lineage (ticket -> rows), and how many calls were issued."""

    __slots__ = ("issued", "tickets")

    def __init__(self) -> None:
        self.tickets: dict[int, list[int]] = {}
        self.issued = 0


class Slot:
    """One logical call: what is asked, where in the run, the how-many-eth of its kind."""

    __slots__ = (
        "attempt",
        "failure",
        "faults",
        "key",
        "lineage",
        "order",
        "played",
        "redacted",
        "request",
        "role",
        "rows",
        "ticket",
    )

    def __init__(self, request: HTTPRequest, key: bytes, lineage: str, ticket: int, rows: Sequence[int]) -> None:
        self.request, self.key, self.lineage, self.ticket, self.rows = request, key, lineage, ticket, rows
        self.role: Role = current_role()
        self.order = 0
        self.attempt = 0  # answers met so far, played or live
        self.played = 0  # recorded answers used
        self.faults = 0  # injected ones met
        self.failure: APIConnectionError | None = None  # what ended the streamed answer just played
        self.redacted: HTTPRequest | None = None


class Tape:
    """What a cassette holds while it is open; plays recorded answers and, with a sink, records new ones."""

    def __init__(
        self,
        rows: Sequence[Row] = (),
        *,
        name: str = "tape",
        sink: Sink | None = None,
        lineage: LineageRule = "strict",
        ignore: Ignore = (),
        latency: Latency = "off",
        faults: Faults | None = None,
        now: Callable[[], float] = time.time,
        on_close: Callable[[Tape], None] | None = None,
    ) -> None:
        self.name = name
        self.report: list[str] = []
        self.misses: list[CassetteMissError] = []
        self.unsaved: list[Exchange] = []
        self.recorded = 0
        self.keeps = True
        self.interrupted = False
        self.plays_failures = True  # or only what was answered: a call that failed is then made anew
        self.expects_all = True  # whether exchanges left unplayed are worth a warning
        self._rows, self._played = rows, bytearray(len(rows))
        self._sink, self._prefer, self._ignore = sink, lineage == "prefer", ignore
        self._scale, self._faults, self._now, self._on_close = latency_scale(latency), faults, now, on_close
        self._exact: dict[tuple[bytes, str], _Pool] = {}  # by a recorded request's very bytes
        self._by_key: dict[tuple[bytes, str], _Pool] | None = None  # by canonical key; built when first needed
        self._orders: dict[str, int] = {}
        self._failures: list[CassetteError] = []
        self._waiting: deque[bytes] = deque()  # lines that the disk refused
        self._fallbacks: list[str] = []
        self._lock = threading.Lock()
        self._closed = False
        self._index(bool(ignore))

    @property
    def records(self) -> bool:
        """Whether a request without a recorded answer goes to the network and is recorded."""
        return self._sink is not None

    def _index(self, loosely: bool) -> None:
        """Sort the rows into pools by their requests' bytes, and by canonical keys where those would tell another tale.

        Tickets count from 0 among requests of one canonical key. So where each pool counts from 0, no two share a key.
        """
        exact = self._exact
        for index, row in enumerate(self._rows):
            place = row.place
            at = place.key, place.lineage
            pool = exact.get(at)
            if pool is None:
                pool = exact[at] = _Pool()
            pool.tickets.setdefault(place.ticket, []).append(index)
        if loosely or any(0 not in pool.tickets for pool in exact.values()):
            self._pools()

    def _pools(self) -> dict[tuple[bytes, str], _Pool]:
        """Return the pools by canonical key; requests of one key, however they are written, share one."""
        if self._by_key is None:
            self._by_key = {}
            for at, pool in self._exact.items():
                first = next(iter(pool.tickets.values()))[0]
                whole = self._by_key.setdefault((self._rows[first].key, at[1]), pool)
                if whole is not pool:
                    self._exact[at] = whole
                    for ticket, rows in pool.tickets.items():
                        whole.tickets[ticket] = sorted(whole.tickets.get(ticket, []) + rows)
        return self._by_key

    def issue(self, request: HTTPRequest) -> Slot:
        """Take the next ticket of this request in this lineage; once for each logical call, when it is issued."""
        here = current_lineage()
        key, redacted, pool = b"", None, None
        if self._exact:
            pool = self._exact.get((raw_key(request.method, redact_url(request.url), request.body), here))
        if pool is None:
            redacted = redact_request(request)
            key = request_key(redacted.method, redacted.url, redacted.body, self._ignore)
        with self._lock:
            if pool is None:
                pool = self._pools().get((key, here))
                if pool is None:
                    here, pool = self._other_pool(key, here)
            ticket = pool.issued
            pool.issued = ticket + 1
            rows = pool.tickets.get(ticket, ())
            slot = Slot(request, key, here, ticket, rows)
            if rows and not self.plays_failures:
                slot.rows, slot.attempt = [row for row in rows if self._is_answered(row)], len(rows)
            if self._sink is not None:
                slot.redacted = redacted
                slot.order = self._orders.get(here, 0)
                self._orders[here] = slot.order + 1
        return slot

    def _is_answered(self, index: int) -> bool:
        row = self._rows[index]
        return row.place.error is None and 200 <= row.reply().status < 300

    def _other_pool(self, key: bytes, here: str) -> tuple[str, _Pool]:
        """Return the pool of a request that was not recorded in this lineage, under the lineage it counts in."""
        pools = self._pools()
        if (plain := pools.get((key, ""))) is not None and plain.tickets:  # recorded without: played in issue order
            return "", plain
        pool = _Pool()
        if self._prefer and (spare := self._spare(key)) is not None:
            lineage, rows = spare
            self._fallbacks.append(f"{here!r} plays {lineage!r}")
            pool.tickets[0] = rows
        else:
            pools[key, here] = pool
        return here, pool

    def _spare(self, key: bytes) -> tuple[str, list[int]] | None:
        """Take the first recorded call of this key, in canonical order, that nothing has claimed."""
        for (other, lineage), pool in self._pools().items():
            if other == key:
                for ticket in sorted(pool.tickets):
                    if ticket >= pool.issued:
                        return lineage, pool.tickets.pop(ticket)
        return None

    def play(self, slot: Slot) -> HTTPReply | None:
        """Return the slot's next recorded answer; None to go live.

        Raises CassetteMissError where nothing answers and nothing is recorded, and again what a recorded
        attempt without an answer had raised; what ended a stream after its first bytes stands in `slot.failure`.
        """
        if self._faults is not None and (fault := self._next_fault(slot)) is not None:
            return fault
        played = slot.played
        if played < len(slot.rows):
            index = slot.rows[played]
            slot.played = slot.attempt = played + 1
            self._played[index] = 1
            row = self._rows[index]
            reply = row.reply()
            if row.place.error is not None:
                slot.failure = _failure(*row.place.error)
                if not reply.body:
                    raise slot.failure
            return reply
        if self._sink is None:
            raise self._miss(slot)
        return None

    def _next_fault(self, slot: Slot) -> HTTPReply | None:
        faults = self._faults
        if (
            faults is None
            or slot.played
            or (kind := faults.choose(self._key_of(slot), slot.lineage, slot.ticket, slot.faults)) is None
        ):
            return None
        slot.faults += 1
        return faults.answer(kind)

    def _key_of(self, slot: Slot) -> bytes:
        """Return the canonical key of what is asked, which a request of recorded bytes was found without."""
        if not slot.key:
            clean = redact_request(slot.request)
            slot.key = request_key(clean.method, clean.url, clean.body, self._ignore)
        return slot.key

    def _miss(self, slot: Slot) -> CassetteMissError:
        request = slot.redacted or redact_request(slot.request)
        asked = Asked(request=request, key=self._key_of(slot), lineage=slot.lineage, ticket=slot.ticket)
        search = len(self.misses) < _EXPLAINED
        miss = CassetteMissError(explain_miss(asked, self._rows, self._played, self.name, search=search))
        self.misses.append(miss)
        return miss

    def record(
        self,
        slot: Slot,
        reply: HTTPReply,
        *,
        usage: Usage | None = None,
        model: str = "",
        failure: APIConnectionError | None = None,
    ) -> None:
        """Write a live answer to the journal, before it is used; every attempt that got one, error statuses too.

        `failure` is what ended a streamed answer after its first bytes.
        Raises SecretLeakError where a secret could not be redacted (nothing was written) and CassetteError
        where the disk refuses; the exchange then stands in `unsaved`, and closing the tape raises again.
        """
        facts = {"usage": _known(usage), "model": model, "ms": round(float(reply.milliseconds), 3)}
        self._record(slot, reply, facts if failure is None else {**facts, "error": _told(failure)})

    def record_failure(self, slot: Slot, error: APIConnectionError) -> None:
        """Write an attempt that got no answer, so that a replay meets the same failure."""
        nothing = HTTPReply(status=0, body=b"", headers={}, reason="no answer")
        self._record(slot, nothing, {"error": _told(error)})

    def _record(self, slot: Slot, reply: HTTPReply, facts: dict[str, object]) -> None:
        if self._sink is None:
            raise CassetteError(f"expected a tape that records, got one that only plays ({self.name})")
        request = slot.redacted or redact_request(slot.request)
        place = Facts(
            lineage=slot.lineage,
            ticket=slot.ticket,
            attempt=slot.attempt,
            order=slot.order,
            role=slot.role,
            at=_utc(int(self._now())),
            chunks=reply.chunks,
            **facts,  # type: ignore[arg-type]
        )
        slot.attempt += 1
        exchange = Exchange(request=request, reply=reply, facts=place)
        try:
            line = redact_line(exchange, needles_for(slot.request))
        except SecretLeakError as error:
            self.unsaved.append(exchange)
            self._failures.append(error)
            raise
        with self._lock:
            self._waiting.append(line)
            try:
                self._write_waiting(self._sink)
            except CassetteError as error:
                self.unsaved.append(exchange)
                self._failures.append(error)
                raise

    def _write_waiting(self, sink: Sink) -> None:
        """Write what the disk refused before, then what is new, in their order."""
        while self._waiting:
            sink.append(self._waiting[0])
            self._waiting.popleft()
            self.recorded += 1

    def delay(self, reply: HTTPReply) -> float:
        """Return how many seconds this replayed answer should take; 0.0 with latency="off"."""
        return reply.milliseconds * self._scale / 1000 if self._scale else 0.0

    def unplayed(self) -> list[Row]:
        """Return the recorded exchanges that nothing has asked for yet."""
        return [row for row, played in zip(self._rows, self._played, strict=True) if not played]

    def tell(self, finding: str, *, warn: bool = True) -> None:
        """Put a finding into the report and warn of it."""
        self.report.append(finding)
        if warn:
            warnings.warn(finding, CassetteWarning, stacklevel=3)

    def interrupt(self) -> None:
        """Say that the recording is not done: closing leaves its journal open, for the next run to go on with."""
        self.interrupted = True

    def discard(self) -> None:
        """Let go of what was recorded: closing leaves the cassette as it was found."""
        self.keeps = False

    def close(self, *, warn: bool = True) -> None:
        """Finish the file and raise what agent code may have hidden: a leak, a full disk, a miss. Once only.

        Without `warn`, as after an error, what stayed unplayed stands in the report alone.
        """
        if self._closed:
            return
        self._closed = True
        if self._sink is not None and self.keeps:
            with suppress(CassetteError):  # remembered since its first refusal, and raised below
                self._write_waiting(self._sink)
        if self._on_close is not None:
            self._on_close(self)
        for error in (*self._failures, *self.misses):
            raise type(error)(f"{error}") from error
        self._tell_the_rest(warn=warn)

    def _tell_the_rest(self, *, warn: bool) -> None:
        if self._fallbacks:
            first = "; ".join(self._fallbacks[:3])
            told = f"{len(self._fallbacks)} calls played what another lineage recorded: {first}"
            self.tell(f"{self.name}: {told}", warn=warn)
        if self.expects_all and (unplayed := len(self._rows) - sum(self._played)):
            told = f"{unplayed} of {len(self._rows)} recorded exchanges were not played"
            self.tell(f"{self.name}: {told}", warn=warn)


def _told(error: APIConnectionError) -> tuple[str, str]:
    return "APITimeoutError" if isinstance(error, APITimeoutError) else "APIConnectionError", error.message


def _failure(kind: str, message: str) -> APIConnectionError:
    return APITimeoutError(message) if kind == "APITimeoutError" else APIConnectionError(message)


@lru_cache(maxsize=8)
def _utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _known(usage: Usage | None) -> dict[str, int | float]:
    """Return the tokens and cost that the provider told."""
    if usage is None:
        return {}
    names = ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "cost")
    return {name: value for name in names if (value := getattr(usage, name)) is not None}
