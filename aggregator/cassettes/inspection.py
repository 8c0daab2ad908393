"""What a recorded cassette holds, as facts: totals, differences, what is wrong with it. Pure functions over rows."""

from __future__ import annotations

from aggregator.cassettes.reading import Row


def exchange_id(row: Row) -> str:
    """Return the name of an exchange within its cassette: lineage, ticket, attempt and the start of its key."""
    place = row.place
    return f"{place.lineage or '-'} #{place.ticket}.{place.attempt} {row.key.hex()[:12]}"
