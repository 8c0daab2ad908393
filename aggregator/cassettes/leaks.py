"""Values that authenticate and are still there after the redaction: in a compressed body, in a lineage."""

from __future__ import annotations

import zlib

from aggregator.cassettes.credentials import Needles
from aggregator.cassettes.exchanges import Exchange
from aggregator.cassettes.secrets import has_needle
from aggregator.errors import SecretLeakError

_LARGEST_INFLATED = 1 << 24


def find_leak(exchange: Exchange, line: bytes, needles: Needles) -> SecretLeakError | None:
    """Return an error where a value that authenticates is still there; it names the place, never the value."""
    request, reply, facts = exchange.request, exchange.reply, exchange.facts
    places = {
        "request body": request.body,
        "compressed request body": inflated(request.body),
        "reply body": reply.body,
        "compressed reply body": inflated(reply.body),
        "lineage": facts.lineage.encode(),
        "exchange": line,
    }
    for place, data in places.items():
        if has_needle(data, needles):
            host = request.url.partition("//")[2].partition("/")[0].rpartition("@")[2].partition("?")[0]
            return SecretLeakError(
                f"expected an exchange without secrets, got one with a value that authenticates in its {place} "
                f"(a {request.method} to {host}, role {facts.role}); it was not written. "
                "Keep the secret out of it, or call the model outside of the cassette"
            )
    return None


def inflated(body: bytes) -> bytes:
    """Return what a body in gzip, zlib or bare deflate holds, as far as it is sane to look; b"" for any other body."""
    if body.isascii():
        return b""
    return next((plain for wbits in (47, -15) if (plain := _unpacked(body, wbits))), b"")


def _unpacked(body: bytes, wbits: int) -> bytes:
    """Return what can be unpacked, of all members of a gzip file."""
    plain = b""
    try:
        while body and len(plain) < _LARGEST_INFLATED:
            member = zlib.decompressobj(wbits=wbits)
            plain += member.decompress(body, _LARGEST_INFLATED - len(plain))
            body = member.unused_data
    except zlib.error:
        pass  # what follows is something else
    return plain
