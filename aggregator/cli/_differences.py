"""How two cassettes differ, exchange by exchange. Pure functions over rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from aggregator.cassettes.exchanges import Exchange, Row, exchange_id
from aggregator.cli._inspection import value_of
from aggregator.text import clip, json_changes

_TELLING_HEADERS = frozenset({"content-type", "location", "retry-after", "retry-after-ms", "x-should-retry"})
"""What a client goes by; dates, ids and rate limits differ in every recording."""


class Difference(Struct, frozen=True, kw_only=True):
    """How two cassettes differ: exchanges of one only, and answers that are not the same any more."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed)


def difference(before: Sequence[Row], after: Sequence[Row]) -> Difference:
    """Compare two cassettes exchange by exchange: the same request at the same place of the run."""
    old = {_identity(row): row for row in before}
    new = {_identity(row): row for row in after}
    changed = {
        exchange_id(row): changes
        for identity, row in old.items()
        if identity in new and (changes := tuple(_answer_changes(row.exchange(), new[identity].exchange())))
    }
    return Difference(
        removed=tuple(exchange_id(row) for identity, row in old.items() if identity not in new),
        added=tuple(exchange_id(row) for identity, row in new.items() if identity not in old),
        changed=changed,
    )


def _identity(row: Row) -> tuple[bytes, str, int, int]:
    return row.key, row.facts.lineage, row.facts.ticket, row.facts.attempt


def _answer_changes(old: Exchange, new: Exchange) -> Iterator[str]:
    yield from (change.removeprefix("$.") for change in describe_changes(_head(old), _head(new)))
    if old.reply.body != new.reply.body:
        changes = list(describe_changes(value_of(old.reply.body), value_of(new.reply.body)))
        yield from changes or ["body: the same JSON, written otherwise"]


def _head(exchange: Exchange) -> dict[str, Any]:
    """Return what an answer says beside its body, and what ended it."""
    reply, error = exchange.reply, exchange.facts.error
    headers = {name: value for name, value in reply.headers.items() if name in _TELLING_HEADERS}
    return {"status": reply.status, **headers, **({"error": ": ".join(error)} if error else {})}


def describe_changes(old: Any, new: Any) -> Iterator[str]:
    """Yield each difference of two JSON values with its path.

    >>> list(describe_changes({"a": [1, 2], "b": 1}, {"a": [1, 3]}))
    ['$.a[1]: 2 -> 3', '$.b: 1 -> nothing']
    """
    for path, before, after in json_changes(old, new, "$"):
        yield f"{path}: {clip(repr(before), 60)} -> {clip(repr(after), 60)}"
