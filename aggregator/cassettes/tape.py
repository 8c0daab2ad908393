"""The tape: (key, lineage, ticket) -> recorded answers, in one dictionary lookup.

A *slot* is one logical call: its ticket is its place in the order of issue, while recording and replaying, so the order
of answers never matters. A slot's *attempts* are its answers in order (a 429, then a 200), including error statuses and
failed connections. No function here awaits.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any, Literal

from aggregator import portal
from aggregator.cassettes.exchanges import Exchange, Facts, Row
from aggregator.cassettes.lineage import current_place
from aggregator.cassettes.matching import hook_reply, hook_request, hooked, matching_by, raw_key
from aggregator.cassettes.mismatch import Asked, explain_miss
from aggregator.cassettes.redaction import redact_requests, redact_url
from aggregator.cassettes.rules import DEFAULT_RULES, TapeRules, host_of, is_ignored, latency_scale
from aggregator.cassettes.slots import Pools, Slot
from aggregator.cassettes.writing import Entry, Sink, Writer
from aggregator.errors import APIConnectionError, APITimeoutError, CassetteError, CassetteMissError, CassetteWarning
from aggregator.records import HTTPReply, HTTPRequest, Usage

_ADDRESSES = 1024  # that are kept in memory
_EXPLAINED = 5  # misses for which the nearest request is searched, which takes a moment in a large cassette

NO_ANSWER = HTTPReply(status=0, body=b"", headers={}, reason="no answer")
"""The reply of an attempt without an answer."""

LARGE = 100_000
"""Bytes of an answer above which it is redacted in a thread: 1 ms of the event loop per 100 KB otherwise."""

Ending = Literal["finish", "interrupt", "discard"]
"""What `close` makes of a recording: finish its file, leave its journal open for the next run, or drop it."""


class Tape:
    """An open cassette: plays recorded answers and, with a sink, records new ones."""

    def __init__(
        self,
        rows: Sequence[Row] = (),
        *,
        name: str = "tape",
        sink: Sink | None = None,
        rules: TapeRules = DEFAULT_RULES,
        now: Callable[[], float] = time.time,
        on_close: Callable[[Tape], None] | None = None,
    ) -> None:
        self.name = name
        self.report: list[str] = []
        self.misses: list[CassetteMissError] = []
        self.rules = rules
        self.ending: Ending = "finish"
        self.permitted_code: set[str] = set()
        self._rows, self._played = rows, bytearray(len(rows))
        self._pools = self._new_pools()
        self.left_out: set[str] = set()
        self._addresses: dict[str, str | None] = {}  # as they are written, by URL; None: left to the network
        self.learned: dict[tuple[Any, ...], Any] = {}  # what our client learned about servers; a replay starts without
        self.exchanges: list[Exchange] = []
        self.plays = 0
        self._left = frozenset(i for i, row in enumerate(rows) if row.facts.error and row.facts.error[0] == _LEFT)
        self._writer = None if sink is None else Writer(sink, now, rules)
        self.records = sink is not None  # requests without a recorded answer, which go to the network
        self._on_close = on_close
        self._scale, self._faults = latency_scale(rules.latency), rules.faults
        # A recording from nothing counts tickets when answers are written: requests are redacted together, which
        # halves the cost, and a failed call leaves no gap.
        self._counts_later = sink is not None and not rows and rules.faults is None
        self._uncounted: list[Slot] = []
        self._orders: dict[str, int] = {}
        self._process = portal.Branch.process
        self._events = count()
        self._answered: list[Slot] = []
        self._lock = threading.Lock()
        self._closed = False

    @property
    def holds_recording(self) -> bool:
        """Whether there were recorded exchanges when it was opened."""
        return bool(self._rows)

    def _new_pools(self) -> Pools:
        rules = self.rules
        matching = matching_by(rules.match_on, rules.ignore)
        if (hook := rules.before_request) is not None:
            matching = hooked(matching, hook)
        prefers = rules.lineage == "prefer"
        return Pools(self._rows, matching=matching, prefer=prefers, repeats=rules.allow_playback_repeats)

    def rewind(self) -> None:
        """Play the recorded exchanges from the beginning again."""
        with self._lock:
            self._pools, self.plays = self._new_pools(), 0
            self._played[:] = bytes(len(self._played))

    @property
    def recorded(self) -> int:
        """The number of written exchanges."""
        return 0 if self._writer is None else self._writer.written

    @property
    def unsaved(self) -> list[Exchange]:
        """Answered exchanges that could not be written, because of a secret or a disk error."""
        return [] if self._writer is None else self._writer.unsaved

    def leaves_out(self, url: str) -> bool:
        """Return True if a request to this address is left to the network: it is neither recorded nor played."""
        return self._address(url) is None

    def _address(self, url: str) -> str | None:
        """Return an address as it is written; None for one that is left to the network."""
        try:
            return self._addresses[url]
        except KeyError:
            if len(self._addresses) >= _ADDRESSES:
                self._addresses.clear()
        address = None if is_ignored(url, self.rules.ignore_hosts) else redact_url(url, self.rules.redaction)
        if address is None:
            self.left_out.add(host_of(url))
        self._addresses[url] = address
        return address

    def admit(self, request: HTTPRequest) -> HTTPRequest | None:
        """Return a request as it is recorded and looked up, None if it is left to the network; then `issue` it."""
        if self._address(request.url) is None:
            return None
        if self.rules.before_request is None:
            return request
        given = hook_request(self.rules.before_request, request)
        if given is None:
            self.left_out.add(host_of(request.url))
        return given

    def issue(self, request: HTTPRequest) -> Slot:
        """Take the next ticket of this request in this lineage; once for each logical call, when it is issued."""
        place, branch = current_place(), portal.current_branch()
        slot = Slot(request, place.path, self.rules.redaction, place.role, branch, next(self._events))
        if self._counts_later:
            with self._lock:
                self._count_order(slot)
                self._uncounted.append(slot)
            return slot
        address = self._addresses.get(request.url) or redact_url(request.url, self.rules.redaction)
        key = raw_key(request.method, address, request.body)
        pool = self._pools.exact.get((key, slot.lineage))
        if pool is None:
            self._pools.key_of_slot(slot)  # outside of the lock
        with self._lock:
            self._pools.claim(slot, pool, labels=self._writer is not None)
            if self._left or not self.rules.plays_failures:
                slot.attempt = len(slot.rows)
                slot.rows = self._playable(slot.rows)
            if self._writer is not None:
                self._count_order(slot)
        return slot

    def withdraw(self, slot: Slot) -> None:
        """Remove a call without a recorded answer, unless an equal one was issued since."""
        with self._lock:
            if slot in self._uncounted:
                self._uncounted.remove(slot)
            else:
                self._pools.withdraw(slot)

    def _count_order(self, slot: Slot) -> None:
        slot.order = self._orders.get(slot.lineage, 0)
        self._orders[slot.lineage] = slot.order + 1

    def _write(self, writer: Writer) -> None:
        """Count the tickets of the calls issued so far, in their order, and write the answered ones."""
        slots, self._uncounted = self._uncounted, []
        with suppress(Exception):  # a request that cannot be redacted raises below, by itself
            clean = redact_requests([slot.request for slot in slots], self.rules.redaction)
            for slot, request in zip(slots, clean, strict=True):
                slot.set_clean(request)
        for slot in slots:
            with suppress(Exception):  # and again when its answer is written, where the call fails
                self._pools.claim(slot, labels=True)
        writer.flush()
        answered, self._answered = self._answered, []
        for slot in answered:
            self._pools.land(slot)

    def _playable(self, rows: Sequence[int]) -> list[int]:
        """Leave out answers to be repeated: a stream that was left early, unless there is no other."""
        found = []
        for row in rows:
            is_last = row == rows[-1] and self._writer is None
            if (row in self._left and not is_last) or not (self.rules.plays_failures or self._is_answered(row)):
                self._played[row] = 1
            else:
                found.append(row)
        return found

    def _is_answered(self, index: int) -> bool:
        row = self._rows[index]
        return row.facts.error is None and 200 <= row.reply().status < 300

    def play(self, slot: Slot) -> HTTPReply | None:
        """Return the slot's next recorded answer; None to go live.

        Raises CassetteMissError without a recorded answer on a tape that only plays, CassetteError if the tape is
        closed and could not record the answer, and for a recorded attempt without an answer its error; the error that
        ended a stream after its first bytes is in `slot.failure`.
        """
        if self._faults is not None and (fault := self._next_fault(slot)) is not None:
            return fault
        played = slot.played
        if played < len(slot.rows):
            index = slot.rows[played]
            slot.played = slot.attempt = played + 1
            self._played[index] = 1
            self.plays += 1
            row = self._rows[index]
            reply = row.reply()
            if row.facts.error is not None:
                slot.failure = _failure(*row.facts.error)
                if not reply.body:
                    raise slot.failure
            return reply
        if self._writer is None:
            raise self._miss(slot)
        self.refuse_if_closed()
        return None

    def recall(self, slot: Slot) -> HTTPReply | None:
        """Return the recorded answer of a run's own mark, None without one; this is never a miss."""
        if not slot.rows:
            return None
        self._played[slot.rows[0]] = 1
        return self._rows[slot.rows[0]].reply()

    def pass_over(self, path: str) -> None:
        """Count the exchanges in and below a lineage as played, since their callers are not run again."""
        for i, row in enumerate(self._rows):
            if row.facts.lineage == path or row.facts.lineage.startswith(f"{path}/"):
                self._played[i] = 1

    def refuse_if_closed(self) -> None:
        """Raise CassetteError if a call would go live and could not be recorded: later, or in a forked process."""
        if self._closed:
            raise CassetteError(self._too_late("a call"))
        self._refuse_elsewhere()

    def _refuse_elsewhere(self) -> None:
        """Raise CassetteError in a forked process: the file and its lock belong to the process that opened them."""
        if portal.Branch.process != self._process:
            raise CassetteError(
                f"Expected calls of the process that opened {self.name} ({self._process}), got one of process "
                f"{os.getpid()}, which was forked from it; open another cassette there"
            )

    def _next_fault(self, slot: Slot) -> HTTPReply | None:
        faults = self._faults
        if (
            faults is None
            or slot.played
            or (kind := faults.choose(self._pools.key_of_slot(slot), slot.lineage, slot.ticket, slot.faults)) is None
        ):
            return None
        slot.faults += 1
        return faults.answer(kind)

    def _miss(self, slot: Slot) -> CassetteMissError:
        key = self._pools.key_of_slot(slot)
        asked = Asked(request=slot.clean(), key=key, lineage=slot.lineage, ticket=slot.ticket)
        search = len(self.misses) < _EXPLAINED
        miss = miss_class()(
            explain_miss(asked, self._rows, self._played, self.name, key_of_row=self._pools.key_of_row, search=search)
        )
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
        """Write a live answer to the journal, before it is used; for every attempt with an answer, error statuses too.

        `failure` is the error that ended a streamed answer after its first bytes, or an attempt with `NO_ANSWER`.
        Raises SecretLeakError if a secret could not be redacted (nothing was written) and CassetteError for a disk
        error; the exchange is then in `unsaved`, and closing the tape raises again.
        """
        entry, _ = self.hand_in(slot, reply, usage=usage, model=model, failure=failure)
        self.finish(entry)

    def hand_in(
        self,
        slot: Slot,
        reply: HTTPReply,
        *,
        usage: Usage | None = None,
        model: str = "",
        failure: APIConnectionError | None = None,
    ) -> tuple[Entry, bool]:
        """Add an answer that the next `flush` writes; return True for the first since the last one.

        `record` in two steps: answers added in one turn of the event loop are written at once; `finish` each before it
        is used.
        """
        entry = self._enter(slot, reply, usage=usage, model=model, failure=failure)
        return entry, not entry.is_done and self._add(entry)

    def _enter(
        self,
        slot: Slot,
        reply: HTTPReply,
        *,
        usage: Usage | None = None,
        model: str = "",
        failure: APIConnectionError | None = None,
    ) -> Entry:
        """Return the entry of an answer; one that a hook leaves unrecorded is finished already."""
        if self._writer is None:
            raise CassetteError(f"Expected a tape that records, got one that only plays ({self.name})")
        self._refuse_elsewhere()
        slot.answered = next(self._events)
        slot.place()
        if self.rules.before_response is not None and reply.status:
            hooked_reply = hook_reply(self.rules.before_response, reply)
            if hooked_reply is None:
                return self._leave_unrecorded(slot, reply)
            reply = hooked_reply
        if self.rules.keeps_exchanges and reply.status:  # a failed attempt is on the tape, but not in what vcrpy shows
            self.exchanges.append(Exchange(request=slot.request, reply=reply, facts=Facts(lineage=slot.lineage)))
        entry = Entry(slot, reply, usage, model, None if failure is None else _describe(failure))
        slot.attempt += 1
        return entry

    def _add(self, entry: Entry) -> bool:
        """Add an entry that the next `flush` writes; return True if it is the first since the last one."""
        with self._lock:
            self._answered.append(entry.slot)
            return self._writer is not None and self._writer.add(entry)

    async def arecord(
        self,
        slot: Slot,
        reply: HTTPReply,
        *,
        usage: Usage | None = None,
        model: str = "",
        failure: APIConnectionError | None = None,
    ) -> None:
        """Write a live answer before it is used, together with others of the same turn of the event loop.

        A large answer is redacted in a thread. Raises as `record` does.
        """
        entry = self._enter(slot, reply, usage=usage, model=model, failure=failure)
        if entry.is_done:
            return
        try:
            if len(reply.body) > LARGE:
                loop = asyncio.get_running_loop()
                with suppress(Exception):  # an answer that cannot be redacted raises when it is written
                    await loop.run_in_executor(None, entry.redact, self.rules.redaction)
        finally:
            if self._add(entry):  # also where the call was cancelled meanwhile
                asyncio.get_running_loop().call_soon(self.flush)
        await asyncio.sleep(0)
        self.finish(entry)

    def _leave_unrecorded(self, slot: Slot, reply: HTTPReply) -> Entry:
        self.withdraw(slot)
        entry = Entry(slot, reply, None, "", None)
        entry.is_done = True
        return entry

    def flush(self) -> None:
        """Write pending entries. Entries that arrive after `close` are rejected, because the file is finished."""
        if self._writer is None or os.getpid() != self._process:
            return
        with self._lock:
            if self._closed:
                self._writer.refuse(CassetteError(self._too_late("an answer")))
            else:
                self._write(self._writer)

    def _too_late(self, what: str) -> str:
        return (
            f"Expected every call inside of the cassette {self.name} to be awaited there, got {what} after it was "
            "left; await the tasks that make calls before the block or the test ends (asyncio.TaskGroup does)"
        )

    def __repr__(self) -> str:
        return f"<Tape {self.name!r}: {len(self._rows)} recorded, {sum(self._played)} of them played>"

    def finish(self, entry: Entry) -> None:
        """Wait until the entry is written; raises as `record` does."""
        if not entry.is_done:
            self.flush()
        if entry.error is not None:
            raise entry.error

    def delay(self, reply: HTTPReply) -> float:
        """Return how many seconds this replayed answer should take; 0.0 with latency="off"."""
        return reply.milliseconds * self._scale / 1000 if self._scale else 0.0

    def unplayed(self) -> list[Row]:
        """Return the recorded exchanges that no call has used yet."""
        return [row for row, played in zip(self._rows, self._played, strict=True) if not played]

    def note(self, finding: str, *, warn: bool = True) -> None:
        """Add a finding to the report and warn of it."""
        self.report.append(finding)
        if warn:
            warnings.warn(finding, CassetteWarning, stacklevel=3)

    def interrupt(self) -> None:
        """Make `close` leave the journal of this recording open, so that the next run continues it."""
        self.ending = "interrupt"

    def discard(self) -> None:
        """Make `close` drop the recording and leave the cassette unchanged."""
        self.ending = "discard"

    def close(self, *, warn: bool = True) -> None:
        """Finish the file and raise errors that agent code may have hidden: a leak, a full disk, a miss. Only once.

        Without `warn`, as after an error, unplayed exchanges are in the report only. In a forked process this does
        nothing.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self.ending != "discard" and self._writer is not None:
                    self._write(self._writer)
            finally:
                if self._on_close is not None:
                    self._on_close(self)
        self.raise_remembered()
        self._tell_the_rest(warn=warn)

    def raise_remembered(self) -> None:
        """Raise errors that agent code may have hidden so far: a leak, a full disk, a miss."""
        refused = [] if self._writer is None else self._writer.errors
        for error in (*refused, *(self.misses if self.rules.raises_again else ())):
            raise type(error)(f"{error}") from error

    def _tell_the_rest(self, *, warn: bool) -> None:
        if self._writer is not None and (changed := self._writer.changed):
            finding = f"{len(changed)} recorded answers were changed by the redaction of secrets, as {changed[0]}"
            self.note(f"{self.name}: {finding}; see the rules for secrets in docs/cassettes.md", warn=warn)
        if self.misses:  # those that are not raised again
            first = f"{self.misses[0]}".partition("\n")[0]
            self.note(f"{self.name}: {len(self.misses)} requests had no recorded answer: {first}", warn=False)
        if looser := self._pools.looser:
            finding = (
                f"{len(looser)} calls played an answer to another request, as match_on allows: {'; '.join(looser[:3])}"
            )
            self.note(f"{self.name}: {finding}", warn=False)
        if fallbacks := self._pools.fallbacks:
            first = "; ".join(fallbacks[:3])
            finding = f"{len(fallbacks)} calls played what another lineage recorded: {first}"
            self.note(f"{self.name}: {finding}", warn=warn)
        for overlapped in self._pools.unordered():
            finding = (
                f"{overlapped} identical requests overlapped in one lineage in an unknown order; give "
                'each its own lineage: `with lineage("branch=1"):`'
            )
            self.note(f"{self.name}: {finding}", warn=warn)
        if self.rules.expects_all and (unplayed := len(self._rows) - sum(self._played)):
            finding = f"{unplayed} of {len(self._rows)} recorded exchanges were not played"
            self.note(f"{self.name}: {finding}", warn=warn)


@cache
def _vcr_miss_class(vcr_error: type[Exception]) -> type[CassetteMissError]:
    class RecordedMissError(CassetteMissError, vcr_error):  # type: ignore[misc, valid-type] # as vcrpy makes it
        """A miss that is also vcrpy's own exception, so that code that catches that works."""

        cassette = failed_request = None
        similar_requests: Sequence[object] = ()

        def __init__(self, message: str) -> None:
            Exception.__init__(self, message)

    RecordedMissError.__name__ = RecordedMissError.__qualname__ = CassetteMissError.__name__
    return RecordedMissError


def miss_class() -> type[CassetteMissError]:
    """Return the class of a miss: also vcrpy's `CannotOverwriteExistingCassetteException` if vcrpy is in use."""
    errors = sys.modules.get("vcr.errors")
    return CassetteMissError if errors is None else _vcr_miss_class(errors.CannotOverwriteExistingCassetteException)


class StreamLeftError(APIConnectionError):
    """A recorded stream that was left before its end is read beyond that point."""


class RecordedError(APIConnectionError):
    """The error that another client raised instead of an answer; `kind` is its class, such as "httpx.ConnectError"."""

    def __init__(self, message: str, *, kind: str, **known: Any) -> None:
        super().__init__(message, **known)
        self.kind = kind


class RecordedTimeoutError(RecordedError, APITimeoutError):
    """A recorded error that was a timeout."""


_LEFT = StreamLeftError.__name__
_FAILURES: tuple[type[APIConnectionError], ...] = (APITimeoutError, StreamLeftError, APIConnectionError)


def _describe(error: APIConnectionError) -> tuple[str, str]:
    if isinstance(error, RecordedError):
        return error.kind, error.message
    return next(kind.__name__ for kind in _FAILURES if isinstance(error, kind)), error.message


def _failure(name: str, message: str) -> APIConnectionError:
    for kind in _FAILURES:
        if kind.__name__ == name:
            return kind(message)
    return (RecordedTimeoutError if "timeout" in name.lower() else RecordedError)(message, kind=name)


def recorded_failure(failure: APIConnectionError) -> RecordedError:
    """Return a recorded failure as another client's; one of our own client has no client's class."""
    if isinstance(failure, RecordedError):
        return failure
    kind = "builtins.TimeoutError" if isinstance(failure, APITimeoutError) else "builtins.ConnectionError"
    return RecordedError(failure.message, kind=kind)
