"""Writing answers to the disk: submitted one by one; redacted, encoded and written together.

Answers of one event loop iteration are written together, before any of them is used: for several exchanges at once this
costs half as much as one by one (`benchmarks/README.md`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Protocol

from aggregator.cassettes.credentials import Redaction
from aggregator.cassettes.exchanges import Exchange, Facts
from aggregator.cassettes.redaction import Line, encode_redacted, needles_for, redact_exchange, redact_lines
from aggregator.cassettes.rules import DEFAULT_RULES, TapeRules
from aggregator.cassettes.slots import Slot
from aggregator.errors import CassetteError
from aggregator.records import HTTPReply, Usage


class Sink(Protocol):
    """The destination of recorded lines: a journal."""

    def extend(self, lines: Sequence[bytes], /) -> None:
        """Write these lines, all or none; raises CassetteError."""
        ...


class Entry:
    """An answer to be written; once it `is_done`, `error` is the reason if it was not written."""

    __slots__ = (
        *("attempt", "error", "exchange", "failure", "is_changed", "is_done", "is_redacted", "line", "model", "reply"),
        *("slot", "usage"),
    )

    def __init__(
        self, slot: Slot, reply: HTTPReply, usage: Usage | None, model: str, failure: tuple[str, str] | None
    ) -> None:
        self.slot, self.reply, self.usage, self.model, self.failure = slot, reply, usage, model, failure
        self.attempt = slot.attempt
        self.exchange: Exchange | None = None
        self.line = b""
        self.error: CassetteError | None = None
        self.is_done = False
        self.is_redacted = self.is_changed = False

    def redact(self, policy: Redaction) -> None:
        """Redact the answer ahead of the others, in any thread, because a large one would block the event loop."""
        slot = self.slot
        facts = Facts(lineage=slot.lineage, model=self.model, chunks=self.reply.chunks, error=self.failure)
        exchange = Exchange(request=slot.clean(), reply=self.reply, facts=facts)
        redacted, is_changed = redact_exchange(exchange, needles_for(slot.request), policy)
        self.reply, self.model, self.failure = redacted.reply, redacted.facts.model, redacted.facts.error
        self.is_changed, self.is_redacted = is_changed, True

    def complete(self, at: str) -> Exchange:
        """Build the exchange to be written, with its original answer."""
        slot, reply = self.slot, self.reply
        request = slot.clean()
        facts = Facts(
            lineage=slot.lineage,
            ticket=slot.ticket,
            attempt=self.attempt,
            order=slot.order,
            role=slot.role,
            branch=slot.label,
            model=self.model,
            ms=round(float(reply.milliseconds), 3),
            at=at,
            usage=_known(self.usage),
            chunks=reply.chunks,
            error=self.failure,
            redacted=slot.digest,
        )
        self.exchange = exchange = Exchange(request=request, reply=reply, facts=facts)
        return exchange


class Writer:
    """Writes entries in the order of submission; the caller holds the tape's lock."""

    def __init__(self, sink: Sink, now: Callable[[], float], rules: TapeRules = DEFAULT_RULES) -> None:
        self.written = 0
        self.changed: list[str] = []  # answers that are written changed
        self._policy = rules.redaction
        self.unsaved: list[Exchange] = []
        self.errors: list[CassetteError] = []
        self._sink, self._now = sink, now
        self._handed: deque[Entry] = deque()
        self._waiting: deque[Entry] = deque()  # lines to be written, those first that the disk refused before

    def add(self, entry: Entry) -> bool:
        """Add an entry; return True for the first one since the last `flush`."""
        self._handed.append(entry)
        return len(self._handed) == 1

    def flush(self) -> None:
        """Write all pending entries, and those that the disk refused before; each entry then has its result.

        SecretLeakError means that a secret could not be redacted: nothing of that exchange was written. CassetteError
        means that the disk refused: the line is retried with the next ones. Both exchanges are in `unsaved`.
        """
        at = _utc(int(self._now()))
        for line in self._lines(list(self._handed), at):
            entry = self._handed.popleft()
            if isinstance(line, CassetteError):
                self._refuse(entry, line)
            else:
                entry.line = line.data
                if line.is_changed:
                    slot = entry.slot
                    asked = slot.clean()
                    self.changed.append(
                        f"that to {asked.method} {asked.url} in lineage {slot.lineage!r}, ticket {slot.ticket}"
                    )
                self._waiting.append(entry)
        if self._waiting:
            self._write_all()

    def refuse(self, error: CassetteError) -> None:
        """Write none of the pending entries."""
        at = _utc(int(self._now()))
        while self._handed:
            with suppress(Exception):  # the disk may refuse this too: the first error is enough
                self._handed[0].complete(at)
            self._refuse(self._handed.popleft(), error)

    def _lines(self, entries: Sequence[Entry], at: str) -> Sequence[Line | CassetteError]:
        """Return the line of each entry, or the reason against it; an invalid one does not block the others."""
        try:
            done = [entry.is_redacted for entry in entries]  # a thread may be redacting it: before its answer is read
            exchanges = [entry.complete(at) for entry in entries]
            needles = [needles_for(entry.slot.request) for entry in entries]
            if not any(done):
                return redact_lines(exchanges, needles, self._policy)
            return [
                encode_redacted(exchange, known, is_changed=entry.is_changed)
                if is_redacted
                else redact_lines([exchange], [known], self._policy)[0]
                for entry, is_redacted, exchange, known in zip(entries, done, exchanges, needles, strict=True)
            ]
        except Exception as error:  # noqa: BLE001 - somebody's own transport may answer anything; it becomes a record
            if len(entries) > 1:
                return [line for entry in entries for line in self._lines([entry], at)]
            refused = CassetteError(f"Expected an exchange that can be written, got {type(error).__name__}: {error}")
            refused.__cause__ = error
            return [refused]

    def _write_all(self) -> None:
        try:
            try:
                self._write(len(self._waiting))
            except CassetteError:
                if len(self._waiting) == 1:
                    raise
                while self._waiting:  # as many of them as fit
                    self._write(1)
        except CassetteError as error:
            for entry in self._waiting:
                if not entry.is_done:
                    self._refuse(entry, error)

    def _write(self, count: int) -> None:
        self._sink.extend([entry.line for entry in islice(self._waiting, count)])
        for _ in range(count):
            self._waiting.popleft().is_done = True
        self.written += count

    def _refuse(self, entry: Entry, error: CassetteError) -> None:
        entry.error, entry.is_done = error, True
        self.errors.append(error)
        if entry.exchange is not None:
            self.unsaved.append(entry.exchange)


@lru_cache(maxsize=8)
def _utc(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _known(usage: Usage | None) -> dict[str, int | float]:
    """Return the tokens and cost that the provider reported."""
    if usage is None:
        return {}
    known = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost": usage.cost,
        "estimated_calls": usage.estimated_calls or None,
    }
    return {name: value for name, value in known.items() if value is not None}
