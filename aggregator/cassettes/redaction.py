"""Secrets never reach the disk: what is written is the exchange without them.

Headers are kept by an allow-list. In URLs, bodies and error texts secrets are replaced by `REDACTED`, found
by name, by shape and by the very values that authenticated. What still holds one of those values afterwards
is refused. Everything else stays as it was, byte for byte.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from urllib.parse import unquote_plus

from msgspec import Struct
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
from aggregator.cassettes.streams import Chunks, hidden_edits, is_form, is_json, is_stream, rebuilt
from aggregator.errors import SecretLeakError
from aggregator.records import HTTPReply, HTTPRequest

KEPT_HEADERS = frozenset(
    {"accept", "content-type", "date", "retry-after", "retry-after-ms", "request-id", "x-request-id", "x-should-retry"}
    | {"location"}
)
_KEPT_PARTS = re.compile(r"(^|-)ratelimit-|-(version|beta|processing-ms)$")  # of any provider, whichever client called
_LARGEST_INFLATED = 1 << 24


@lru_cache(maxsize=1024)
def is_kept(name: str, kept: tuple[str, ...] = ()) -> bool:
    """Return True if a header of this lower-case name is written; `kept` are the provider's own (`HTTPRequest.kept`).

    >>> is_kept("x-acme-region", ("x-acme-*",)), is_kept("authorization")
    (True, False)
    """
    if name in KEPT_HEADERS or _KEPT_PARTS.search(name):
        return True
    return any(name == more or (more.endswith("*") and name.startswith(more[:-1])) for more in kept)


@lru_cache(maxsize=1024)
def redact_url(url: str) -> str:
    """Return the URL without secret query values, also in its fragment, and without a password.

    >>> redact_url("https://me:pass@x.example/v1?key=abc&alt=sse#access_token=abc")
    'https://REDACTED@x.example/v1?key=REDACTED&alt=sse#access_token=REDACTED'
    """
    address, hash_mark, fragment = url.partition("#")
    head, mark, query = address.partition("?")
    if "@" in head:
        head = re.sub(r"//[^/]*@", f"//{PLACEHOLDER}@", head)
    return "".join((head, mark, redact_form(query), hash_mark, redact_form(fragment)))


def redact_form(pairs: str) -> str:
    """Return a form's fields, or a query's parameters, without the secret ones.

    >>> redact_form("client%5Fsecret=abc&user[password]=abc&page=2")
    'client%5Fsecret=REDACTED&user[password]=REDACTED&page=2'
    """
    return "&".join(map(_redact_pair, pairs.split("&"))) if "=" in pairs else pairs


def _redact_pair(pair: str) -> str:
    name, mark, value = pair.partition("=")
    plain = unquote_plus(name).rstrip("]").replace("[", ".")  # PHP and Rails write user[password]
    return f"{name}={PLACEHOLDER}" if mark and value and is_secret_parameter(plain) else pair


class Frame(Struct, frozen=True):
    """What of a request repeats from call to call: what must not be found beside it, its URL and headers as written."""

    needles: Needles
    url: str
    headers: dict[str, str]
    is_form: bool


def frame_of(request: HTTPRequest) -> Frame:
    """Return the request's frame; equal ones are one object, and nobody writes to it."""
    return _frame(request.url, tuple(request.headers.items()), request.secrets, request.kept)


@lru_cache(maxsize=256)
def _frame(url: str, headers: tuple[tuple[str, str], ...], secrets: tuple[str, ...], kept: tuple[str, ...]) -> Frame:
    return _clean_frame(url, headers, needles_of(authenticating_values(url, dict(headers), secrets)), kept)


@lru_cache(maxsize=256)
def _clean_frame(url: str, headers: tuple[tuple[str, str], ...], needles: Needles, kept: tuple[str, ...]) -> Frame:
    written = _clean_headers(_kept(headers, kept), needles)
    return Frame(needles, redact_text(redact_url(url), needles), written, is_form(written))


def needles_for(request: HTTPRequest) -> Needles:
    """Return what must not be found in anything that is written about this request."""
    return frame_of(request).needles


def looks_clean(texts: Iterable[bytes], needles: Iterable[Needles]) -> bool:
    """Say whether one quick look at all these texts finds nothing, so that none of them needs the thorough one."""
    data = b"\n".join(texts)
    known = set(needles)
    return not has_hidden_text(data) and not suspicious(data, known.pop() if len(known) == 1 else _united(known))


def _united(needles: Iterable[Needles]) -> Needles:
    return tuple(sorted({needle for some in needles for needle in some}))


def redact_requests(requests: Sequence[HTTPRequest]) -> list[HTTPRequest]:
    """Return requests as they may be written; keys are computed from these, so that the file gives the same keys."""
    frames = [frame_of(request) for request in requests]
    clean = looks_clean([request.body for request in requests], [frame.needles for frame in frames])
    return [_redacted(request, frame, clean=clean) for request, frame in zip(requests, frames, strict=True)]


def redact_request(request: HTTPRequest, needles: Needles | None = None) -> HTTPRequest:
    """Return one request as it may be written, by what authenticates it or by the needles given."""
    if needles is None:
        return redact_requests([request])[0]
    return _redacted(
        request, _clean_frame(request.url, tuple(request.headers.items()), needles, request.kept), clean=False
    )


def _redacted(request: HTTPRequest, frame: Frame, *, clean: bool) -> HTTPRequest:
    body = _without_fields(request.body) if frame.is_form else request.body
    if not clean and not looks_clean([body], [frame.needles]):
        body = redact_body(body, frame.needles)[0]
    return HTTPRequest(method=request.method, url=frame.url, body=body, headers=frame.headers, kept=request.kept)


def _without_fields(body: bytes) -> bytes:
    """Return a form without its secret fields."""
    return redact_form(body.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def redact_line(exchange: Exchange, needles: Needles = ()) -> bytes:
    """Return the line of an exchange whose request is redacted; raises SecretLeakError."""
    (line,) = redact_lines([exchange], [needles])
    if isinstance(line, SecretLeakError):
        raise line
    return line


def redact_lines(exchanges: Sequence[Exchange], needles: Sequence[Needles]) -> list[bytes | SecretLeakError]:
    """Return the lines of exchanges whose requests are redacted, or why one cannot be written; each has its needles."""
    kept = [_without_headers(exchange) for exchange in exchanges]
    clean = looks_clean([text for exchange in kept for text in _texts(exchange)], needles)
    return [_line(exchange, known, clean=clean) for exchange, known in zip(kept, needles, strict=True)]


def _without_headers(exchange: Exchange) -> Exchange:
    """Return the exchange with those of its answer's headers that are written, its head as text."""
    reply = exchange.reply
    kept = HTTPReply(
        status=reply.status,
        body=reply.body,
        headers=_kept(reply.headers.items(), exchange.request.kept),
        reason=_as_text(reply.reason),
        milliseconds=reply.milliseconds,
        chunks=reply.chunks,
    )
    return Exchange(request=exchange.request, reply=kept, facts=exchange.facts)


def _texts(exchange: Exchange) -> tuple[bytes, bytes]:
    """Return where a secret could stand in what the exchange adds to its request."""
    reply, facts = exchange.reply, exchange.facts
    return reply.body, "\n".join((facts.lineage, facts.model, reply.reason, *reply.headers.values())).encode()


def _line(exchange: Exchange, needles: Needles, *, clean: bool) -> bytes | SecretLeakError:
    reply = exchange.reply
    values = "".join(reply.headers.values())
    if not clean or "=" in values or "@" in values:
        exchange = replace(exchange, reply=replace(reply, headers=_clean_headers(reply.headers, needles)))
    if not _is_due(exchange, needles, clean=clean) and _is_text(exchange.request.body) and _is_text(reply.body):
        return encode_line(exchange)
    redacted = _redact_reply(exchange, needles)
    line = encode_line(redacted)
    return _leak(redacted, line, needles) or line


def _is_due(exchange: Exchange, needles: Needles, *, clean: bool) -> bool:
    """Say whether the exchange needs the thorough look."""
    reply = exchange.reply
    return (
        bool(reply.chunks)
        or is_stream(reply.headers)
        or is_form(reply.headers)
        or exchange.facts.error is not None
        or (not clean and not looks_clean(_texts(exchange), [needles]))
    )


def _redact_reply(exchange: Exchange, needles: Needles) -> Exchange:
    reply, facts = exchange.reply, exchange.facts
    form = [(0, len(reply.body), _without_fields(reply.body))] if is_form(reply.headers) and reply.body else []
    body, steps = redact_body(apply_edits(reply.body, form), needles)
    return replace(
        exchange,
        reply=replace(reply, body=body, reason=redact_text(reply.reason, needles)),
        facts=replace(
            facts,
            model=redact_text(facts.model, needles),
            chunks=_moved_chunks(facts.chunks, [form, *steps]),
            error=facts.error and (facts.error[0], redact_text(facts.error[1], needles)),
        ),
    )


def _kept(headers: Iterable[tuple[str, str]], more: tuple[str, ...]) -> dict[str, str]:
    """Return the headers that are written, as text, their names in lower case."""
    return {
        lower: value if value.isascii() else _as_text(value)
        for name, value in headers
        if is_kept(lower := name.lower(), more)
    }


def _clean_headers(headers: Mapping[str, str], needles: Needles) -> dict[str, str]:
    return {name: _clean_value(value, needles) for name, value in headers.items()}


@lru_cache(maxsize=1024)
def _clean_value(value: str, needles: Needles) -> str:
    """Return a header's value, which may be an address, without secrets; most values repeat."""
    due = "=" in value or "@" in value or suspicious(value.encode(), needles)
    return redact_text(value, needles) if due else value


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


def _leak(exchange: Exchange, line: bytes, needles: Needles) -> SecretLeakError | None:
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
        if any(needle in data for needle in needles):
            return SecretLeakError(
                f"expected an exchange without secrets, got one with a value that authenticates in its {place} "
                f"(a {request.method} to {_host(request.url)}, role {facts.role}); it was not written. "
                "Keep the secret out of it, or call the model outside of the cassette"
            )
    return None


def _host(url: str) -> str:
    """Return the host of any URL, also of one that is none."""
    return url.partition("//")[2].partition("/")[0].rpartition("@")[2].partition("?")[0]


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
