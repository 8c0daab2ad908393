"""Which recorded answers are a call's: by its request, its lineage, and the order in which such calls are issued."""

from __future__ import annotations

from collections.abc import Sequence

from aggregator.cassettes.keys import Ignore, request_key
from aggregator.cassettes.lineage import current_role
from aggregator.cassettes.redaction import redact_request
from aggregator.cassettes.rows import Row
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
        self._by_key: dict[_At, Pool] | None = None  # built when first needed
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

    def _canonical(self) -> dict[_At, Pool]:
        """Return the pools by canonical key; requests of one key, however they are written, share one."""
        if self._by_key is None:
            self._by_key = {}
            for at, pool in self.exact.items():
                first = pool.rows(pool.tickets()[0])[0]
                whole = self._by_key.setdefault((self._rows[first].key, at[1]), pool)
                if whole is not pool:
                    self.exact[at] = whole
                    for ticket in pool.tickets():
                        whole.put(ticket, tuple(sorted(whole.rows(ticket) + pool.rows(ticket))))
        return self._by_key

    def take(self, slot: Slot) -> Pool:
        """Return the pool of a request whose bytes were not recorded where it stands; that may change its lineage."""
        pools = self._canonical()
        key, here = slot.canonical_key(self._ignore), slot.lineage
        pool = pools.get((key, here))
        if pool is not None:
            return pool
        if (plain := pools.get((key, ""))) is not None and (
            plain.first or plain.later
        ):  # recorded without: played in issue order
            slot.lineage = ""
            return plain
        pool = Pool()
        if self._prefer and (spare := self._spare(key)) is not None:
            lineage, rows = spare
            self.fallbacks.append(f"{here!r} plays {lineage!r}")
            pool.first = rows
        else:
            pools[key, here] = pool
        return pool

    def _spare(self, key: bytes) -> tuple[str, tuple[int, ...]] | None:
        """Take the first recorded call of this key, in canonical order, that nothing has claimed."""
        for (other, lineage), pool in self._canonical().items():
            if other == key:
                for ticket in pool.tickets():
                    if ticket >= pool.issued:
                        rows = pool.rows(ticket)
                        pool.put(ticket, ())
                        return lineage, rows
        return None
