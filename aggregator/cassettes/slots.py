"""Which recorded answers are a call's: by its request, its lineage, and the order in which such calls are issued."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from aggregator.cassettes.exchanges import Row
from aggregator.cassettes.keys import Ignore, request_key
from aggregator.cassettes.lineage import current_role
from aggregator.cassettes.redaction import redact_request, redact_requests
from aggregator.errors import APIConnectionError
from aggregator.records import HTTPRequest, Role

_At = tuple[bytes, str]


class Slot:
    """One logical call: what is asked, where in the run, the how-many-eth of its kind.

    `rows` are its recorded answers, `ticket` is -1 until it is counted, which a tape without any puts off.
    """

    __slots__ = (
        "attempt",
        "failure",
        "faults",
        "key",
        "lineage",
        "order",
        "played",
        "pool",
        "redacted",
        "request",
        "role",
        "rows",
        "ticket",
    )

    def __init__(self, request: HTTPRequest, lineage: str) -> None:
        self.request, self.lineage = request, lineage
        self.role: Role = current_role()
        self.ticket = -1
        self.pool: Pool | None = None  # where the ticket was counted
        self.rows: Sequence[int] = ()
        self.order = 0
        self.attempt = 0  # answers met so far, played or live
        self.played = 0  # recorded answers used
        self.faults = 0  # injected ones met
        self.failure: APIConnectionError | None = None  # what ended the streamed answer just played
        self.key = b""  # the canonical one, where it was needed
        self.redacted: HTTPRequest | None = None

    def clean(self) -> HTTPRequest:
        """Return the request as it may be written."""
        if self.redacted is None:
            self.redacted = redact_request(self.request)
        return self.redacted

    def canonical_key(self, ignore: Ignore) -> bytes:
        """Return the canonical key of what is asked, which a request of recorded bytes is found without."""
        if not self.key:
            request = self.clean()
            self.key = request_key(request.method, request.url, request.body, ignore)
        return self.key


def clean_together(slots: Sequence[Slot]) -> None:
    """Make the requests of several slots what may be written; one that cannot be keeps its own error for later."""
    with suppress(Exception):
        for slot, request in zip(slots, redact_requests([slot.request for slot in slots]), strict=True):
            slot.redacted = request


class Pool:
    """Recorded answers to identical requests of one lineage, and how many of those were issued.

    `first` are the rows of ticket 0, which is the only one of nearly every pool; `later` maps the others to theirs.
    """

    __slots__ = ("first", "issued", "later")

    def __init__(self) -> None:
        self.first: tuple[int, ...] = ()
        self.later: dict[int, tuple[int, ...]] | None = None
        self.issued = 0

    def take(self) -> tuple[int, tuple[int, ...]]:
        """Return the next ticket and its rows."""
        ticket = self.issued
        self.issued = ticket + 1
        return ticket, self.rows(ticket)

    def rows(self, ticket: int) -> tuple[int, ...]:
        """Return the rows of a ticket."""
        if not ticket:
            return self.first
        return () if self.later is None else self.later.get(ticket, ())

    def put(self, ticket: int, rows: tuple[int, ...]) -> None:
        """Make these the rows of a ticket."""
        if not ticket:
            self.first = rows
        elif self.later is None:
            self.later = {ticket: rows}
        else:
            self.later[ticket] = rows

    def tickets(self) -> list[int]:
        """Return the tickets that have rows, in order."""
        return ([0] if self.first else []) + sorted(ticket for ticket, rows in (self.later or {}).items() if rows)


class Pools:
    """The rows of a tape in their pools: by a recorded request's very bytes, by canonical key where those differ."""

    def __init__(self, rows: Sequence[Row], *, ignore: Ignore, prefer: bool) -> None:
        """Sort the rows into pools by their requests' bytes, and by canonical keys where those would tell another tale.

        Tickets count from 0 among requests of one canonical key. So where each pool counts from 0, no two share a key.
        """
        self.fallbacks: list[str] = []
        self.exact: dict[_At, Pool] = {}
        self._rows, self._ignore, self._prefer = rows, ignore, prefer
        self._by_key: dict[bytes, dict[str, Pool]] | None = None  # built when first needed
        exact = self.exact
        for index, row in enumerate(rows):
            place = row.place
            at = place.key, place.lineage
            pool = exact.get(at)
            if pool is None:
                pool = exact[at] = Pool()
            pool.put(place.ticket, (*pool.rows(place.ticket), index))
        if ignore or not all(pool.first for pool in exact.values()):
            self._canonical()

    def _canonical(self) -> dict[bytes, dict[str, Pool]]:
        """Return the pools by canonical key and lineage; requests of one key, however they are written, share one."""
        if self._by_key is None:
            self._by_key = {}
            spellings: dict[_At, list[_At]] = {}
            for at, pool in self.exact.items():
                first = pool.rows(pool.tickets()[0])[0]
                spellings.setdefault((self._rows[first].key, at[1]), []).append(at)
            for (key, lineage), written in spellings.items():
                whole = self._joined([self.exact[at] for at in written])
                self._by_key.setdefault(key, {})[lineage] = whole
                self.exact.update(dict.fromkeys(written, whole))
        return self._by_key

    def _joined(self, pools: list[Pool]) -> Pool:
        """Return one pool for several; what was counted apart (without `ignore`) is counted anew, in order of issue."""
        if len(pools) == 1:
            return pools[0]
        slots = [(ticket, pool.rows(ticket)) for pool in pools for ticket in pool.tickets()]
        if len({ticket for ticket, _ in slots}) < len(slots):
            issued = sorted((self._rows[rows[0]].place.order, rows) for _, rows in slots)
            slots = [(ticket, rows) for ticket, (_, rows) in enumerate(issued)]
        whole = Pool()
        whole.issued = sum(pool.issued for pool in pools)
        for ticket, rows in slots:
            whole.put(ticket, rows)
        return whole

    def claim(self, slot: Slot, pool: Pool | None = None) -> None:
        """Count a call and give it the recorded answers of its ticket; `pool` is that of its very bytes, if known."""
        if pool is None:
            pool = self._pool(slot)
        slot.pool = pool
        slot.ticket, slot.rows = pool.take()
        if self._prefer and not slot.rows:
            slot.rows = self._spare(slot, pool)

    def _pool(self, slot: Slot) -> Pool:
        """Return the pool of a request whose bytes were not recorded where it stands; that may change its lineage."""
        pools = self._canonical().setdefault(slot.canonical_key(self._ignore), {})
        pool = pools.get(slot.lineage)
        if pool is not None:
            return pool
        plain = pools.get("")
        if plain is not None and (plain.first or plain.later):  # recorded without: played in issue order
            slot.lineage = ""
            return plain
        pool = pools[slot.lineage] = Pool()
        return pool

    def _spare(self, slot: Slot, own: Pool) -> tuple[int, ...]:
        """Take the first recorded call of this request in another lineage, in canonical order, that nothing claimed."""
        pools = self._canonical().get(slot.canonical_key(self._ignore), {})
        for lineage, pool in pools.items():
            unclaimed = () if pool is own else [ticket for ticket in pool.tickets() if ticket >= pool.issued]
            for ticket in unclaimed[:1]:
                rows = pool.rows(ticket)
                pool.put(ticket, ())
                self.fallbacks.append(f"{slot.lineage!r} plays {lineage!r}")
                return rows
        return ()
