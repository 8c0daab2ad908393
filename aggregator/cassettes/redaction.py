"""Secrets never reach the disk: what is written is the exchange without them.

Headers are kept by an allow-list. In URLs, bodies and error texts secrets are replaced by `REDACTED`, found
by name, by shape and by the very values that authenticated. What still holds one of those values afterwards
is refused. Everything else stays as it was, byte for byte.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from msgspec.structs import replace

from aggregator.cassettes.exchanges import Exchange, encode_line
from aggregator.cassettes.secrets import (
    PLACEHOLDER,
    Edit,
    Needles,
    apply_edits,
    authenticating_values,
    has_hidden_text,
    is_secret_parameter,
    moved,
    needles_of,
    query_edits,
    secret_edits,
    suspicious,
)
from aggregator.cassettes.streams import Chunks, hidden_edits, is_json, is_stream, rebuilt
from aggregator.errors import SecretLeakError
from aggregator.records import HTTPRequest

KEPT_HEADERS = frozenset(
    {"accept", "content-type", "date", "retry-after", "retry-after-ms", "request-id", "x-request-id", "x-should-retry"}
    | {"location"}
    | {"anthropic-version", "anthropic-beta", "openai-beta", "openai-version", "openai-processing-ms"}
)
_KEPT_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
_LARGEST_INFLATED = 1 << 24


@lru_cache(maxsize=1024)
def is_kept(name: str) -> bool:
    """Say whether a header of this lower-case name is written."""
    return name in KEPT_HEADERS or name.startswith(_KEPT_PREFIXES)


@lru_cache(maxsize=1024)
def redact_url(url: str) -> str:
    """Return the URL without secret query values and without a password.

    >>> redact_url("https://me:pass@x.example/v1?key=abc&alt=sse")
    'https://REDACTED@x.example/v1?key=REDACTED&alt=sse'
    """
    head, mark, query = url.partition("?")
    if "@" in head:
        head = re.sub(r"//[^/@]*@", f"//{PLACEHOLDER}@", head)
    if not mark:
        return head
    return f"{head}?{'&'.join(_redact_pair(pair) for pair in query.split('&'))}"


def _redact_pair(pair: str) -> str:
    name, mark, value = pair.partition("=")
    return f"{name}={PLACEHOLDER}" if mark and value and is_secret_parameter(name) else pair


def needles_for(request: HTTPRequest) -> Needles:
    """Return what must not be found in anything that is written about this request."""
    return _needles(request.url, tuple(request.headers.items()), request.secrets)


@lru_cache(maxsize=256)
def _needles(url: str, headers: tuple[tuple[str, str], ...], secrets: tuple[str, ...]) -> Needles:
    return needles_of(authenticating_values(url, dict(headers), secrets))


def redact_request(request: HTTPRequest, needles: Needles | None = None) -> HTTPRequest:
    """Return the request as it may be written; its key is computed from this, so that the file gives the same key."""
    needles = needles_for(request) if needles is None else needles
    url, headers = _clean_frame(request.url, tuple(request.headers.items()), needles)
    body = request.body
    if "x-www-form-urlencoded" in headers.get("content-type", ""):
        body = redact_url(f"?{body.decode(errors='surrogateescape')}")[1:].encode(errors="surrogateescape")
    if suspicious(body, needles) or has_hidden_text(body):
        body = redact_body(body, needles)[0]
    return HTTPRequest(method=request.method, url=url, body=body, headers=headers)


@lru_cache(maxsize=256)
def _clean_frame(url: str, headers: tuple[tuple[str, str], ...], needles: Needles) -> tuple[str, dict[str, str]]:
    """Return the URL and headers of a request without secrets; they repeat, and nobody writes to them."""
    return _clean_url(url, needles), _kept(headers, needles)


@lru_cache(maxsize=1024)
def _clean_url(url: str, needles: Needles) -> str:
    return redact_text(redact_url(url), needles)


def redact_line(exchange: Exchange, needles: Needles = ()) -> bytes:
    """Return the line of an exchange whose request is redacted; raises SecretLeakError."""
    reply = exchange.reply
    kept = _kept(reply.headers.items(), needles)
    exchange = replace(exchange, reply=replace(reply, headers=kept, reason=_as_text(reply.reason)))
    if not _is_due(exchange, needles) and _is_text(exchange.request.body) and _is_text(reply.body):
        return encode_line(exchange)
    clean = _redact_reply(exchange, needles)
    line = encode_line(clean)
    _refuse_leaks(clean, line, needles)
    return line


def _is_due(exchange: Exchange, needles: Needles) -> bool:
    """Say whether the exchange needs the thorough look."""
    reply, facts = exchange.reply, exchange.facts
    texts = f"\n{facts.lineage}\n{facts.model}\n{reply.reason}".encode()
    return (
        bool(reply.chunks)
        or is_stream(reply.headers)
        or facts.error is not None
        or suspicious(reply.body + texts, needles)
        or has_hidden_text(reply.body)
    )


def _redact_reply(exchange: Exchange, needles: Needles) -> Exchange:
    reply, facts = exchange.reply, exchange.facts
    body, steps = redact_body(reply.body, needles)
    return replace(
        exchange,
        reply=replace(reply, body=body, reason=redact_text(reply.reason, needles)),
        facts=replace(
            facts,
            model=redact_text(facts.model, needles),
            chunks=_moved_chunks(facts.chunks, steps),
            error=facts.error and (facts.error[0], redact_text(facts.error[1], needles)),
        ),
    )


def _kept(headers: Iterable[tuple[str, str]], needles: Needles) -> dict[str, str]:
    """Return the headers that are written, without secrets in them."""
    lowered = ((name.lower(), value) for name, value in headers)
    return {name: _clean_value(value, needles) for name, value in lowered if is_kept(name)}


@lru_cache(maxsize=1024)
def _clean_value(value: str, needles: Needles) -> str:
    """Return a header's value without secrets; most values repeat."""
    value = _as_text(value)
    return redact_text(value, needles) if "=" in value or suspicious(value.encode(), needles) else value


def _as_text(head: str) -> str:
    """Return a part of an answer's head as text that can be written; aiohttp escapes bytes that are no UTF-8."""
    return head if head.isascii() else head.encode(errors="surrogateescape").decode(errors="replace")


def _is_text(body: bytes) -> bool:
    """Say whether the body stands in the line as text, which the quick look has seen as it is written."""
    try:
        return body.isascii() or bool(body.decode())
    except UnicodeDecodeError:
        return False


def redact_text(text: str, needles: Needles) -> str:
    """Return a short text, such as an error's message, without secrets.

    >>> redact_text("cannot reach https://x.example/?key=abc", ())
    'cannot reach https://x.example/?key=REDACTED'
    """
    data = text.encode()
    data = apply_edits(data, query_edits(data))
    return apply_edits(data, secret_edits(data, needles)).decode()


def redact_body(body: bytes, needles: Needles) -> tuple[bytes, list[list[Edit]]]:
    """Return the body without secrets, and the edits of each step, for whoever must find its chunks again."""
    first = secret_edits(body, needles)
    clean = apply_edits(body, first)
    if first and is_json(body) and not is_json(clean):  # a value began within an escape, such as backslash u0041
        first = [(0, len(body), rebuilt(body, needles))]
        clean = first[0][2]
    body = clean
    second = hidden_edits(body, needles)
    return apply_edits(body, second), [first, second]


def _moved_chunks(chunks: Chunks, steps: list[list[Edit]]) -> Chunks:
    """Return the chunks of a redacted body: their borders move with what was replaced before them."""
    borders, end = [], 0
    for length, _ in chunks:
        end += length
        borders.append(end)
    for edits in steps:
        borders = [moved(border, edits) for border in borders]
    return tuple((b - a, ms) for a, b, (_, ms) in zip((0, *borders), borders, chunks, strict=False))


def _refuse_leaks(exchange: Exchange, line: bytes, needles: Needles) -> None:
    """Raise where a value that authenticates is still there; the message names the place, never the value."""
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
        if any(needle in data for needle in needles):
            raise SecretLeakError(
                f"expected an exchange without secrets, got one with a value that authenticates in its {place} "
                f"(a {request.method} to {urlsplit(request.url).hostname}, role {facts.role}); it was not written. "
                "Keep the secret out of it, or call the model outside of the cassette"
            )


def inflated(body: bytes) -> bytes:
    """Return what a gzip or zlib body holds, as far as it is sane to look; b"" for any other body."""
    if body[:2] not in (b"\x1f\x8b", b"\x78\x9c", b"\x78\x01", b"\x78\xda"):
        return b""
    try:
        return zlib.decompressobj(wbits=47).decompress(body, _LARGEST_INFLATED)
    except zlib.error:
        return b""
