"""Nearest recorded request."""

from __future__ import annotations

from collections.abc import Sequence

from aggregator.cassettes.rows import Row
from aggregator.records import HTTPRequest


def nearest(request: HTTPRequest, rows: Sequence[Row]) -> Row | None:
    """Return one."""
    return rows[0] if rows else None


def explain_miss(request: HTTPRequest, lineage: str, ticket: int, rows: Sequence[Row], name: str) -> str:
    """Say what is nearest."""
    near = nearest(request, rows)
    text = near.exchange().request.body[:2000].decode(errors="replace") if near else "nothing"
    return (
        f"expected a recorded answer in {name} (lineage {lineage!r}, ticket {ticket}), got none; nearest: {text}\n"
        f"asked: {request.method} {request.url} {request.body[:2000].decode(errors='replace')}"
    )
