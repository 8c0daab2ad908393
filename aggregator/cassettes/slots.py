"""Assigns recorded answers to calls: by request, lineage and the order of issue."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import cast
from weakref import ref

from msgspec import Struct

from aggregator import portal
from aggregator.cassettes.credentials import Redaction
from aggregator.cassettes.exchanges import Row
from aggregator.cassettes.matching import USUAL_MATCHING, KeyOf, Matching, key_of_request
from aggregator.cassettes.redaction import digest_of_redacted, redact_request
from aggregator.errors import APIConnectionError
from aggregator.records import HTTPRequest, Role

_At = tuple[bytes, str]

ROOT = "/"
"""The label of a call of the code that no task, thread or pool item runs."""

UNORDERED = "?"
"""The label of a call that overlapped with an identical one, if their order is unknown."""

APART = "!"
"""The beginning of the label of a call whose branch made no call without a label."""


class Slot(Struct, eq=False):
    """One logical call: its request, its lineage, and its ticket, which counts such calls in the order of issue.

    `rows` are its recorded answers. `label` distinguishes it from identical calls that overlapped with it, by their
    place in the concurrent work; "" for a call that overlapped with none. `issued` and `answered` count these events
    over all calls of a tape.
    """

    request: HTTPRequest
    lineage: str
    policy: Redaction
    role: Role
    branch: portal.Branch | None
    issued: int
    answered: int = -1
    label: str = ""
    ticket: int = -1
    pool: Pool | None = None  # the pool that counted the ticket
    rows: Sequence[int] = ()
    order: int = 0
    attempt: int = 0  # answers so far, played or live
    played: int = 0  # recorded answers used
    faults: int = 0  # injected faults so far
    failure: APIConnectionError | None = None  # the error that ended the streamed answer just played
    key: bytes = b""  # of the matching, once needed
    redacted: HTTPRequest | None = None
    digest: str = ""  # digest of what was redacted in the body, once the request is clean

    def place(self) -> None:
        """Label a call of concurrent work, in which identical calls may overlap."""
        if not self.label and self.branch is not None and self.branch.is_concurrent():
            self.label = self.branch.inner

    def clean(self) -> HTTPRequest:
        """Return the request as it may be written."""
        if self.redacted is None:
            self.set_clean(redact_request(self.request, policy=self.policy))
        return cast("HTTPRequest", self.redacted)

    def set_clean(self, redacted: HTTPRequest) -> None:
        """Set the request as it may be written."""
        self.redacted = redacted
        if redacted.body != self.request.body:
            self.digest = digest_of_redacted(self.request, self.policy)

    def key_by(self, key_of: KeyOf) -> bytes:
        """Return the key of the request; one whose exact bytes were recorded is found without it."""
        if not self.key:
            self.key = key_of(self.clean())
        return self.key


class Pool:
    """Recorded answers to equal requests of one lineage: unclaimed rows by ticket, in order, and the next ticket.

    `row` is one of its rows, -1 for a pool without recorded answers. `labels` has the tickets of calls that overlapped
    by their label, and those of the others under ""; None where no call overlapped. `flying` are live calls, of which
    the last may be unanswered.
    `plain` has the work that made calls whose label does not begin with `APART`, with the number of its calls before
    the latest of them; `block` is the place where the first one's lineage block was entered. `unordered` counts calls
    that cannot be distinguished.
    `is_mixed` if rows were claimed out of order because of what was redacted.
    """

    __slots__ = ("block", "flying", "is_mixed", "issued", "labels", "last", "plain", "row", "rows", "unordered")

    def __init__(self, row: int = -1) -> None:
        self.row = row
        self.rows: dict[int, tuple[int, ...]] = {}
        self.issued = 0
        self.is_mixed = False
        self.last: Sequence[int] = ()  # the last claimed answer
        self.labels: dict[str, deque[int]] | None = None
        self.flying: list[Slot] = []
        self.block: str | None = None
        self.plain: dict[ref[portal.Branch], int] = {}  # weak: a branch lives as long as work that it started
        self.unordered = 0

    def take(self, branch: portal.Branch | None) -> int:
        """Return the ticket of the next call that is made on this branch of the concurrent work.

        Calls without a label play in their order. Each other call plays the answer of its own branch; on a branch that
        was not recorded, the first one left.
        """
        if not (labels := self.labels):
            return self.issued
        for own in (branch.path or ROOT, branch.inner) if branch is not None else ():
            if (left := labels.get(APART + own)) and (ticket := self._first(left)) >= 0:
                return ticket
        names = ["", *({branch.inner or ".", branch.path or ".", branch.path or ROOT} if branch is not None else ())]
        found = [ticket for name in names if name in labels and (ticket := self._first(labels[name])) >= 0]
        if found or not self.rows:
            return min(found, default=self.issued)
        ticket = next(iter(self.rows))
        if branch is not None and not labels.keys().isdisjoint((*names, APART + (branch.path or ROOT))):
            owner = next((name for name, tickets in labels.items() if ticket in tickets), "").removeprefix(APART)
            # A recorded branch asks more often than it did: workers take items from a queue. Work that it started
            # itself, as the other executor does for each call, is no other branch.
            self.unordered += not owner.startswith(f"{branch.path}.")
        return ticket

    def _first(self, tickets: deque[int]) -> int:
        while tickets and tickets[0] not in self.rows:
            tickets.popleft()
        return tickets[0] if tickets else -1

    def label(self, slot: Slot, recorded: str | None = None) -> None:
        """Distinguish a live call from identical overlapping ones, by the shortest sufficient part of its place.

        That is its branch since the innermost lineage block, or else its whole branch. A block that several threads or
        tasks enter does not distinguish them, so the calls of all but the first keep their whole branch, even without
        an overlap. `recorded` is the label of the answer that a call plays.
        """
        if (branch := slot.branch) is None:
            return
        work, label = branch.base or branch, recorded or ""
        block = branch.outer.path if branch.outer is not None else ""
        if self.block is None and not label.startswith(APART):
            self.block = block
        if recorded is None:
            slot.place()
            if block != self.block and branch.outer is not None and branch.outer.is_concurrent(whole=True):
                slot.label = branch.path
            slot.label = slot.label or self._background_label(branch)
            if slot.label and ref(work) not in self.plain:
                slot.label = APART + slot.label
            self._compare(slot)
            label = slot.label
        if not label.startswith(APART):
            self.plain[ref(work)] = work.calls
        work.calls += 1

    def _background_label(self, branch: portal.Branch) -> str:
        """Return a label if the work that started this one, or work that this one started, makes such calls too.

        Either the starter has made such a call since, or the other work has made one and still runs. Without a label
        their order would decide, which is another one in another run.
        """
        work = own = branch.base or branch
        while self.plain and work.parent is not None:
            starter = work.parent.base or work.parent
            if self.plain.get(ref(starter), -1) >= work.calls_before:
                return branch.inner or branch.path
            work = starter
        if not own.has_started:
            return ""
        if not any((other := known()) is not None and _runs_within(other, own) for known in self.plain):
            self.plain = {known: calls for known, calls in self.plain.items() if known() is not None}
            return ""
        if ref(own) not in self.plain:
            return branch.path or ROOT
        self.unordered += 1
        return UNORDERED

    def _compare(self, slot: Slot) -> None:
        self.flying = [other for other in self.flying if other.answered < 0 or other.answered > slot.issued]
        for other in self.flying:
            for one, two in ((slot, other), (other, slot)):
                here, there = one.branch, two.branch
                if here is None or there is None or one.label == UNORDERED:
                    continue
                if here.path == there.path:
                    one.label = UNORDERED
                    self.unordered += 1
                elif here.inner == there.inner:
                    one.label = (APART if one.label.startswith(APART) else "") + (here.path or ".")
                else:
                    one.label = one.label or here.inner or "."
        self.flying.append(slot)


def _runs_within(work: portal.Branch, other: portal.Branch) -> bool:
    """Return True if a thread, pool item or task still runs, and the other work started it or its starter."""
    task = None if work.task is None else work.task()
    if work.has_ended or (work.task is not None and (task is None or task.done())):
        return False
    above = work.parent
    while above is not None and (above.base or above) is not other:
        above = above.parent or above.outer
    return above is not None


class Pools:
    """The rows of a tape in their pools: by the exact bytes of the recorded request, by key where those differ."""

    def __init__(
        self, rows: Sequence[Row], *, matching: Matching = USUAL_MATCHING, prefer: bool = False, repeats: bool = False
    ) -> None:
        """Group rows by exact request bytes; fall back to keys where the two groupings differ.

        Tickets count from 0 among requests of one canonical key. So if each pool counts from 0, no two share a key.
        """
        self.fallbacks: list[str] = []
        self.looser: list[str] = []  # calls that played an answer recorded for another request
        self.exact: dict[_At, Pool] = {}
        self._rows, self._matching, self._prefer, self._repeats = rows, matching, prefer, repeats
        self._counts: dict[_At, int] = {}  # tickets of new calls if the matching is not the usual one
        self._by_key: dict[bytes, dict[str, Pool]] | None = None  # built when first needed
        exact, labelled = self.exact, False
        for index, row in enumerate(rows):
            facts = row.facts
            at = facts.key, facts.lineage
            pool = exact.get(at)
            if pool is None:
                pool = exact[at] = Pool(index)
            pool.rows[facts.ticket] = (*pool.rows.get(facts.ticket, ()), index)
            labelled = labelled or bool(facts.branch)
        if matching.key_of is not None or not all(0 in pool.rows for pool in exact.values()):
            self._pools_by_key()
        for pool in set(exact.values()) if labelled else ():
            self._read_labels(pool)

    def _read_labels(self, pool: Pool) -> None:
        labels: dict[str, deque[int]] = {}
        for ticket, rows in pool.rows.items():
            label = self._rows[rows[0]].facts.branch
            pool.unordered += label == UNORDERED
            labels.setdefault("" if label == UNORDERED else label, deque()).append(ticket)
        pool.labels = labels if labels.keys() != {""} else None

    def unordered(self) -> list[int]:
        """Return for each request and lineage how many identical calls overlapped and cannot be distinguished."""
        pools = {id(pool): pool for pool in self.exact.values()}
        for by_lineage in (self._by_key or {}).values():
            pools.update((id(pool), pool) for pool in by_lineage.values())
        return [max(pool.unordered, 2) for pool in pools.values() if pool.unordered]

    def key_of_row(self, index: int) -> bytes:
        """Return the key of a recorded request."""
        row = self._rows[index]
        return row.key if self._matching.key_of is None else self._matching.key_of(row.exchange().request)

    def key_of_slot(self, slot: Slot) -> bytes:
        """Return the key of a call's request."""
        return slot.key_by(self._matching.key_of or key_of_request)

    def _pools_by_key(self) -> dict[bytes, dict[str, Pool]]:
        """Return the pools by key and lineage; requests with the same key share one, in any notation."""
        if self._by_key is None:
            self._by_key = {}
            spellings: dict[_At, list[_At]] = {}
            for at, pool in self.exact.items():
                spellings.setdefault((self.key_of_row(pool.row), at[1]), []).append(at)
            for (key, lineage), written in spellings.items():
                whole = self._join([self.exact[at] for at in written])
                self._by_key.setdefault(key, {})[lineage] = whole
                self.exact.update(dict.fromkeys(written, whole))
        return self._by_key

    def _join(self, pools: list[Pool]) -> Pool:
        """Merge several pools into one; their tickets are counted again, in the order of issue."""
        if len(pools) == 1:
            return pools[0]
        whole = Pool(pools[0].row)
        whole.issued = sum(pool.issued for pool in pools)
        tickets = [item for pool in pools for item in pool.rows.items()]
        if len({ticket for ticket, _ in tickets}) < len(tickets):
            issued = sorted((self._rows[rows[0]].facts.order, rows) for _, rows in tickets)
            tickets = [(ticket, rows) for ticket, (_, rows) in enumerate(issued, whole.issued)]
        whole.rows = dict(sorted(tickets))
        if any(pool.labels for pool in pools):
            self._read_labels(whole)
        return whole

    def claim(self, slot: Slot, pool: Pool | None = None, *, labels: bool = False) -> None:
        """Count a call and give it the recorded answers of its ticket; `pool` is that of its exact bytes, if known.

        With `labels`, as while recording, a call without answers is distinguished from those that it overlaps with.
        """
        if pool is None:
            pool = self._pool(slot)
        slot.pool, slot.ticket = pool, pool.take(slot.branch)
        if slot.digest:
            self._prefer_same_redacted(slot, pool)
        if pool.is_mixed and slot.ticket not in pool.rows:
            slot.ticket = next(iter(pool.rows), slot.ticket)
        if self._matching.matchers:
            slot.ticket = self._first_match(slot, pool)
        slot.rows = rows = pool.rows.pop(slot.ticket, ())
        pool.issued += 1
        if labels:
            pool.label(slot, self._rows[rows[0]].facts.branch if rows else None)
        if not rows and self._repeats and pool.last:
            slot.rows = pool.last
        elif not rows and self._prefer:
            slot.rows = self._take_from_another_lineage(slot)
        elif self._repeats:
            pool.last = rows[-1:]
        if self._matching.is_looser:
            self._note_looser(slot)

    def _first_match(self, slot: Slot, pool: Pool) -> int:
        """Return the ticket of the first unclaimed call that the matchers find equal."""
        asked = slot.clean()
        for ticket, rows in pool.rows.items():
            if self._matching.same(asked, self._rows[rows[0]].exchange().request):
                return ticket
        return -1

    def _note_looser(self, slot: Slot) -> None:
        """Report a call that plays an answer recorded for another request; count the ticket of a new one as usual."""
        asked = slot.clean()
        key = key_of_request(asked)
        if slot.rows:
            row = self._rows[slot.rows[0]]
            if row.key != key:
                self.looser.append(f"{asked.method} {asked.url} plays exchange {slot.rows[0]}")
            return
        if not self._counts:
            for row in self._rows:
                at = row.key, row.facts.lineage
                self._counts[at] = max(self._counts.get(at, 0), row.facts.ticket + 1)
        slot.ticket = self._counts.get((key, slot.lineage), 0)
        self._counts[key, slot.lineage] = slot.ticket + 1

    def _prefer_same_redacted(self, slot: Slot, pool: Pool) -> None:
        """Give the slot the ticket of a call with the same redacted parts in its body, if there is one."""
        same = [ticket for ticket, rows in pool.rows.items() if self._rows[rows[0]].facts.redacted == slot.digest]
        if same and slot.ticket not in same:
            pool.is_mixed, slot.ticket = True, same[0]

    def land(self, slot: Slot) -> None:
        """Forget a live call that is answered or withdrawn: no later call overlaps with it."""
        if slot.pool is not None and slot in slot.pool.flying:
            slot.pool.flying.remove(slot)

    def withdraw(self, slot: Slot) -> None:
        """Release the ticket of a call, unless an equal one was issued since."""
        self.land(slot)
        pool = slot.pool
        if pool is not None and pool.issued == slot.ticket + 1 and not self._matching.is_looser:
            pool.issued -= 1
            if slot.rows and not slot.played:
                pool.rows = dict(sorted({**pool.rows, slot.ticket: tuple(slot.rows)}.items()))

    def _pool(self, slot: Slot) -> Pool:
        """Return the pool of a request without an exact match. May reset the slot's lineage to ""."""
        pools = self._pools_by_key().setdefault(self.key_of_slot(slot), {})
        pool = pools.get(slot.lineage)
        if pool is not None:
            return pool
        plain = pools.get("")
        if plain is not None and plain.row >= 0:  # recorded without lineage: played in the order of issue
            slot.lineage = ""
            return plain
        pool = pools[slot.lineage] = Pool()
        return pool

    def _take_from_another_lineage(self, slot: Slot) -> tuple[int, ...]:
        """Take the first unclaimed call of this request in another lineage, in canonical order."""
        pools = self._pools_by_key().get(self.key_of_slot(slot), {})
        for lineage, pool in pools.items():
            if pool is not slot.pool and pool.rows:
                self.fallbacks.append(f"{slot.lineage!r} plays {lineage!r}")
                return pool.rows.pop(next(iter(pool.rows)))
        return ()
