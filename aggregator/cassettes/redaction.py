"""Secrets never reach the disk: exchanges are written without them.

Headers are kept by an allow-list. In addresses, bodies and error texts secrets are replaced by `REDACTED`, found by
name, by form and by the authentication values themselves. An exchange that still holds such a value is refused.
Everything else keeps its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from urllib.parse import quote_plus, unquote_plus, unquote_to_bytes

from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.credentials import (
    PLACEHOLDER,
    USUAL,
    Needles,
    Redaction,
    authenticating_values,
    is_secret_parameter,
    is_worth_finding,
    looks_secret,
    may_authenticate,
    needles_of,
)
from aggregator.cassettes.exchanges import Exchange, encode_line
from aggregator.cassettes.payloads import inflated, is_json, is_stream
from aggregator.cassettes.secrets import (
    MARK,
    Edit,
    apply_edits,
    has_hidden_text,
    has_needle,
    moved,
    query_edits,
    secret_edits,
    suspicious,
    unescape,
)
from aggregator.cassettes.streams import hidden_edits, is_clean_stream, redact_document
from aggregator.errors import SecretLeakError
from aggregator.records import HTTPReply, HTTPRequest

# Forms: url-encoded and multipart bodies, and the queries of addresses

_BOUNDARY = re.compile(r'multipart/[\w.+-]+\s*;.*?boundary="?([^";]+)"?', re.IGNORECASE)
_PART_NAME = re.compile(
    rb'^content-disposition:[^\r\n]*?[;\s]name="?([^"\r\n;]*)"?([^\r\n]*)', re.IGNORECASE | re.MULTILINE
)


# ---- forms and addresses


def is_form(headers: Mapping[str, str]) -> bool:
    """Return True if a body with these headers is a form of either kind."""
    kind = headers.get("content-type", "").lower()
    return "x-www-form-urlencoded" in kind or kind.startswith("multipart/")


def hides_parameter_always(name: str, policy: Redaction = USUAL) -> bool:
    """Return True if a query or form field of this name loses any value; PHP and Rails write `user[password]`."""
    plain = unquote_plus(name).rstrip("]").replace("[", ".")
    lower = plain.lower()
    return lower in policy.fields or (lower not in policy.kept_fields and is_secret_parameter(plain))


def redact_form(pairs: str, policy: Redaction = USUAL) -> str:
    """Return a form's fields, or a query's parameters, without the secret ones.

    >>> redact_form("client%5Fsecret=abc&user[password]=abc&page=2")
    'client%5Fsecret=REDACTED&user[password]=REDACTED&page=2'
    """
    if "=" not in pairs:
        return pairs
    found = []
    for pair in pairs.split("&"):
        name, mark, value = pair.partition("=")
        found.append(f"{name}={PLACEHOLDER}" if mark and value and hides_parameter_always(name, policy) else pair)
    return "&".join(found)


@lru_cache(maxsize=1024)
def redact_url(url: str, policy: Redaction = USUAL) -> str:
    """Return the URL without secret query values, also in its fragment, and without a password.

    >>> redact_url("https://me:pass@x.example/v1?key=abc&alt=sse#access_token=abc")
    'https://REDACTED@x.example/v1?key=REDACTED&alt=sse#access_token=REDACTED'
    """
    address, hash_mark, fragment = url.partition("#")
    head, mark, query = address.partition("?")
    if "@" in head:
        head = re.sub(r"//[^/]*@", f"//{PLACEHOLDER}@", head)
    return "".join((head, mark, redact_form(query, policy), hash_mark, redact_form(fragment, policy)))


def form_edits(body: bytes, headers: Mapping[str, str], policy: Redaction = USUAL) -> list[Edit]:
    """Return the edits of a form, url-encoded or in parts, except its files; also in JSON in a field.

    >>> form_edits(b"a=1&api_key=abc", {"content-type": "application/x-www-form-urlencoded"})
    [(12, 15, b'REDACTED')]
    """
    kind = headers.get("content-type", "")
    if match := _BOUNDARY.search(kind):
        return [
            (start, end, MARK)
            for name, start, end in _parts(body, match[1].encode())
            if end > start and hides_parameter_always(name, policy)
        ]
    edits, start = [], 0
    for pair in body.split(b"&"):
        name, mark, value = pair.partition(b"=")
        if mark and value and hides_parameter_always(name.decode(errors="replace"), policy):
            edits.append((start + len(name) + 1, start + len(pair), MARK))
        elif value.startswith((b"%7B", b"%7b", b"{", b"%5B", b"%5b", b"[")):
            document = unquote_to_bytes(value.replace(b"+", b" "))
            if inner := secret_edits(document, (), policy):
                written = quote_plus(apply_edits(document, inner)).encode()
                edits.append((start + len(name) + 1, start + len(pair), written))
        start += len(pair) + 1
    return edits


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield the fields of a multipart body: name, start and end of the value. Files are left out."""
    mark = b"--" + boundary
    start = body.find(mark)
    while start >= 0:
        start += len(mark)
        following = body.find(b"\n" + mark, start)
        end = following if following >= 0 else len(body)
        head = re.compile(rb"\r?\n\r?\n").search(body, start, end)
        if head is not None and (named := _PART_NAME.search(body, start, head.start())) and b"filename" not in named[2]:
            stop = end - 1 if body[end - 1 : end] == b"\r" else end
            yield named[1].decode(errors="replace"), head.end(), max(head.end(), stop)
        start = following + 1 if following >= 0 else -1


__all__ = ["inflated", "redact_form", "redact_url"]  # with the definitions of this file

KEPT_HEADERS = frozenset(
    {"accept", "content-type", "date", "retry-after", "retry-after-ms", "request-id", "x-request-id", "x-should-retry"}
    | {"location", "link", "etag", "last-modified", "content-disposition", "content-range", "accept-ranges"}
    | {"content-language", "vary", "allow", "www-authenticate", "proxy-authenticate", "mcp-session-id"}
    | {"x-repo-commit", "x-linked-size", "x-linked-etag", "x-total-count", "x-next-page", "x-error-code"}
    | {"operation-location", "x-ms-request-id", "apim-request-id"}
    | {"x-amzn-requestid", "x-amzn-errortype", "x-error-message"}
)
"""Headers that are recorded: those that a client obeys."""
SECRET_HEADERS = frozenset({"cookie", "set-cookie", "authorization", "proxy-authorization"})
_KEPT_PARTS = re.compile(  # of any provider and any client
    r"(^|-)ratelimit-|-(version|beta|processing-ms)$|^x-(amzn-bedrock|goog-upload)-"
)


@lru_cache(maxsize=1024)
def is_kept(name: str, kept: tuple[str, ...] = ()) -> bool:
    """Return True if a header of this lower-case name is recorded; `kept` are the provider's own and the user's.

    >>> is_kept("x-acme-region", ("x-acme-*",)), is_kept("authorization")
    (True, False)
    """
    if name in KEPT_HEADERS or _KEPT_PARTS.search(name):
        return True
    return any(name == more or (more.endswith("*") and name.startswith(more[:-1])) for more in kept)


@lru_cache(maxsize=1024)
def is_kept_without_value(name: str, kept: tuple[str, ...]) -> bool:
    """Return True if only a pattern keeps this header, and its name may be a secret's.

    >>> is_kept_without_value("x-auth-token", ("*",)), is_kept_without_value("x-auth-token", ("x-auth-token",))
    (True, False)
    """
    is_meant = name in kept or is_kept(name)
    return not is_meant and is_kept(name, kept) and (name in SECRET_HEADERS or is_secret_parameter(name))


_Pairs = tuple[tuple[str, str], ...]


# Requests


# ---- what is known of one exchange


class Frame(Struct, frozen=True):
    """The repeating part of a request: its secrets, and its URL and headers as they are written."""

    needles: Needles
    url: str
    headers: dict[str, str]
    is_form: bool


@lru_cache(maxsize=256)
def _frame(url: str, headers: _Pairs, secrets: tuple[str, ...], kept: tuple[str, ...], policy: Redaction) -> Frame:
    return _clean_frame(url, headers, _needles(url, _authenticating(headers), secrets), kept, policy)


@lru_cache(maxsize=256)
def _clean_frame(url: str, headers: _Pairs, needles: Needles, kept: tuple[str, ...], policy: Redaction) -> Frame:
    written = _clean_headers(_kept(headers, (*kept, *policy.headers)), needles, policy)
    return Frame(needles, _clean_url(url, needles, policy), written, is_form(written))


@lru_cache(maxsize=256)
def _needles(url: str, headers: _Pairs, secrets: tuple[str, ...]) -> Needles:
    values = authenticating_values(url, dict(headers), secrets)
    return needles_of(frozenset(filter(is_worth_finding, values)))


@lru_cache(maxsize=256)
def _clean_url(url: str, needles: Needles, policy: Redaction) -> str:
    return redact_text(redact_url(url, policy), needles, policy)


@lru_cache(maxsize=256)
def _authenticating(headers: _Pairs) -> _Pairs:
    """Return the headers that may authenticate; the others, such as request ids, differ in every call."""
    return tuple(header for header in headers if may_authenticate(header[0]))


def frame_of(request: HTTPRequest, policy: Redaction = USUAL) -> Frame:
    """Return the request's frame; equal ones are one object, which is never changed."""
    return _frame(request.url, tuple(request.headers.items()), request.secrets, request.kept, policy)


def needles_for(request: HTTPRequest) -> Needles:
    """Return the values that must not occur in anything written about this request."""
    return _needles(request.url, _authenticating(tuple(request.headers.items())), request.secrets)


def looks_clean(texts: Iterable[bytes], needles: Iterable[Needles], policy: Redaction = USUAL) -> bool:
    """Return True if a quick search of all these texts finds nothing, so that none of them needs the thorough one."""
    data = b"\n".join(texts)
    known = set(needles)
    united = known.pop() if len(known) == 1 else tuple(sorted({needle for some in known for needle in some}))
    if suspicious(data, united, policy):
        return False
    return not has_hidden_text(data) or not suspicious(unescape(data), united, policy)


# ---- requests


def redact_requests(requests: Sequence[HTTPRequest], policy: Redaction = USUAL) -> list[HTTPRequest]:
    """Return requests as they may be written; keys are computed from these, so that the file gives the same keys."""
    frames = [frame_of(request, policy) for request in requests]
    clean = looks_clean([request.body for request in requests], [frame.needles for frame in frames], policy)
    return [_redacted(request, frame, policy, clean=clean) for request, frame in zip(requests, frames, strict=True)]


def redact_request(request: HTTPRequest, needles: Needles | None = None, policy: Redaction = USUAL) -> HTTPRequest:
    """Return one request as it may be written, by its authentication or by the given secrets."""
    if needles is None:
        return redact_requests([request], policy)[0]
    return _redacted(
        request, _clean_frame(request.url, tuple(request.headers.items()), needles, request.kept, policy), policy
    )


def _redacted(request: HTTPRequest, frame: Frame, policy: Redaction, *, clean: bool = False) -> HTTPRequest:
    body = request.body
    if frame.is_form:
        body = apply_edits(body, form_edits(body, frame.headers, policy))
    if not clean and not looks_clean([body], [frame.needles], policy):
        body = redact_body(body, frame.needles, policy)[0]
    return HTTPRequest(method=request.method, url=frame.url, body=body, headers=frame.headers, kept=request.kept)


def removed_from(
    body: bytes, headers: Mapping[str, str], needles: Needles = (), policy: Redaction = USUAL
) -> Iterator[bytes]:
    """Yield the texts that are redacted in a body."""
    form = form_edits(body, headers, policy) if is_form(headers) else []
    yield from (body[start:end] for start, end, _ in form)
    rest = apply_edits(body, form)
    for edits in redact_body(rest, needles, policy)[1]:
        yield from (rest[start:end] for start, end, _ in edits)
        rest = apply_edits(rest, edits)


def digest_of_redacted(request: HTTPRequest, policy: Redaction = USUAL) -> str:
    """Return four hex digits that distinguish requests which differ only in the redacted parts of their bodies.

    Authentication is left out: another key finds the same answer. "" if nothing else was redacted.
    """
    frame = frame_of(request, policy)
    removed = set(removed_from(request.body, frame.headers, (), policy))
    counted = sorted(text for text in removed if not has_needle(text, frame.needles))
    return sha256(b"\0".join(counted)).hexdigest()[:4] if counted else ""


# Exchanges


# ---- lines and exchanges


class Line(Struct, frozen=True):
    """An exchange as it is written, and whether its answer was changed."""

    data: bytes
    is_changed: bool = False


def redact_line(exchange: Exchange, needles: Needles = (), policy: Redaction = USUAL) -> bytes:
    """Return the line of an exchange whose request is redacted; raises SecretLeakError."""
    (line,) = redact_lines([exchange], [needles], policy)
    if isinstance(line, SecretLeakError):
        raise line
    return line.data


def redact_lines(
    exchanges: Sequence[Exchange], needles: Sequence[Needles], policy: Redaction = USUAL
) -> list[Line | SecretLeakError]:
    """Return the lines of exchanges with redacted requests, or why one cannot be written; each has its secrets."""
    kept = [_without_headers(exchange, policy) for exchange in exchanges]
    clean = looks_clean([text for exchange in kept for text in _texts(exchange)], needles, policy)
    return [_line(exchange, known, policy, clean=clean) for exchange, known in zip(kept, needles, strict=True)]


def _without_headers(exchange: Exchange, policy: Redaction) -> Exchange:
    """Return the exchange with only the recorded headers of its answer, its head as text."""
    reply = exchange.reply
    headers = _kept(reply.headers.items(), (*exchange.request.kept, *policy.headers))
    if exchange.request.method == "HEAD" and "content-length" in reply.headers:
        headers["content-length"] = reply.headers["content-length"]  # of the body that GET would send
    kept = HTTPReply(
        status=reply.status,
        body=reply.body,
        headers=headers,
        reason=_as_text(reply.reason),
        milliseconds=reply.milliseconds,
        chunks=reply.chunks,
    )
    return Exchange(request=exchange.request, reply=kept, facts=exchange.facts)


def _texts(exchange: Exchange) -> tuple[bytes, bytes]:
    """Return the texts of the answer and the facts that may hold a secret; a stream is searched separately."""
    reply, facts = exchange.reply, exchange.facts
    return b"" if is_stream(reply.headers) else reply.body, "\n".join(
        (facts.lineage, facts.model, reply.reason, *reply.headers.values())
    ).encode()


def _line(exchange: Exchange, needles: Needles, policy: Redaction, *, clean: bool) -> Line | SecretLeakError:
    reply = exchange.reply
    values = "".join(reply.headers.values())
    if not clean or "=" in values or "@" in values:
        headers = _clean_headers(reply.headers, needles, policy)
        exchange = replace(exchange, reply=replace(reply, headers=headers))
    if not _is_due(exchange, needles, policy, clean=clean) and _is_text(exchange.request.body) and _is_text(reply.body):
        return Line(encode_line(exchange), exchange.reply.headers != reply.headers)
    redacted = _redact_answer(exchange, needles, policy)
    return encode_redacted(redacted, needles, is_changed=redacted.reply != reply)


def encode_redacted(exchange: Exchange, needles: Needles, *, is_changed: bool) -> Line | SecretLeakError:
    """Return the line of a redacted exchange, or the reason why it cannot be written."""
    line = encode_line(exchange)
    return _leak(exchange, line, needles) or Line(line, is_changed)


def redact_exchange(exchange: Exchange, needles: Needles, policy: Redaction = USUAL) -> tuple[Exchange, bool]:
    """Return an exchange with a redacted request with its answer redacted too, and whether that changed it."""
    kept = _without_headers(exchange, policy)
    headers = _clean_headers(kept.reply.headers, needles, policy)
    redacted = _redact_answer(replace(kept, reply=replace(kept.reply, headers=headers)), needles, policy)
    return redacted, redacted.reply != kept.reply


def _is_due(exchange: Exchange, needles: Needles, policy: Redaction, *, clean: bool) -> bool:
    """Return True if the exchange needs the thorough search."""
    reply = exchange.reply
    return (
        bool(reply.chunks)
        or is_stream(reply.headers)
        or is_form(reply.headers)
        or exchange.facts.error is not None
        or (not clean and not looks_clean(_texts(exchange), [needles], policy))
    )


def _redact_answer(exchange: Exchange, needles: Needles, policy: Redaction) -> Exchange:
    """Return the exchange with the body and reason of its answer, and its facts, redacted."""
    reply, facts = exchange.reply, exchange.facts
    form = form_edits(reply.body, reply.headers, policy) if is_form(reply.headers) else []
    body, steps = redact_body(apply_edits(reply.body, form), needles, policy)
    return replace(
        exchange,
        reply=replace(
            reply,
            body=body,
            reason=_clean_value(reply.reason, needles, policy),
            chunks=_moved_chunks(reply.chunks, [form, *steps]),
        ),
        facts=replace(
            facts,
            model=_clean_value(facts.model, needles, policy),
            chunks=_moved_chunks(facts.chunks, [form, *steps]),
            error=facts.error and (facts.error[0], redact_text(facts.error[1], needles, policy)),
        ),
    )


def _kept(headers: Iterable[tuple[str, str]], more: tuple[str, ...]) -> dict[str, str]:
    """Return the recorded headers as text, with names in lower case."""
    written = {
        lower: value if value.isascii() else _as_text(value)
        for name, value in headers
        if is_kept(lower := name.lower(), more)
    }
    for name in [name for name in written if more and is_kept_without_value(name, more)]:
        if name == "set-cookie":
            written[name] = redact_cookies(written[name])
        elif name in SECRET_HEADERS or is_worth_finding(written[name]):
            written[name] = PLACEHOLDER
    return written


# ---- headers, texts and bodies


def redact_cookies(lines: str) -> str:
    r"""Return cookies set by a server, one a line, without the values that look like secrets.

    >>> redact_cookies("theme=dark; Path=/\nsid=a1b2c3d4e5f6a7b8; HttpOnly")
    'theme=dark; Path=/\nsid=REDACTED; HttpOnly'
    """
    found = []
    for line in lines.split("\n"):
        name, mark, rest = line.partition("=")
        value, end, attributes = rest.partition(";")
        found.append(f"{name}{mark}{PLACEHOLDER if looks_secret(value) else value}{end}{attributes}")
    return "\n".join(found)


def _clean_headers(headers: Mapping[str, str], needles: Needles, policy: Redaction) -> dict[str, str]:
    return {name: _clean_value(value, needles, policy) for name, value in headers.items()}


@lru_cache(maxsize=1024)
def _clean_value(value: str, needles: Needles, policy: Redaction) -> str:
    """Return a header's value, which may be an address, without secrets; cached, because most values repeat."""
    due = "=" in value or "@" in value or suspicious(value.encode(), needles, policy)
    return redact_text(value, needles, policy) if due else value


def _as_text(head: str) -> str:
    """Return a part of an answer's head as writable text; aiohttp escapes bytes that are not UTF-8."""
    return head if head.isascii() else head.encode(errors="surrogateescape").decode(errors="replace")


def _is_text(body: bytes) -> bool:
    """Return True if the body is in the line as text, which the quick search has covered."""
    try:
        return body.isascii() or bool(body.decode())
    except UnicodeDecodeError:
        return False


def redact_text(text: str, needles: Needles, policy: Redaction = USUAL) -> str:
    """Return a short text, such as an error's message, without secrets.

    >>> redact_text("cannot reach https://x.example/?key=abc", ())
    'cannot reach https://x.example/?key=REDACTED'
    """
    data = text.encode()
    data = apply_edits(data, query_edits(data))
    return apply_edits(data, secret_edits(data, needles, policy)).decode()


def redact_body(body: bytes, needles: Needles, policy: Redaction = USUAL) -> tuple[bytes, list[list[Edit]]]:
    """Return the body without secrets, and the edits of each step, which locate its chunks."""
    if is_clean_stream(body, needles, policy):
        return body, [[], []]
    first = secret_edits(body, needles, policy)
    clean = apply_edits(body, first)
    if first and is_json(body) and not is_json(clean):  # a value began within an escape, such as backslash u0041
        first = [(0, len(body), redact_document(body, needles, policy))]
        clean = first[0][2]
    second = hidden_edits(clean, needles, policy)
    return apply_edits(clean, second), [first, second]


def _moved_chunks(chunks: tuple[tuple[int, float], ...], steps: list[list[Edit]]) -> tuple[tuple[int, float], ...]:
    """Return the chunks of a redacted body, with boundaries moved by the replacements before them."""
    borders, end = [], 0
    for length, _ in chunks:
        end += length
        borders.append(end)
    for edits in steps:
        borders = [moved(border, edits) for border in borders]
    return tuple((b - a, ms) for a, b, (_, ms) in zip((0, *borders), borders, chunks, strict=False))


def _leak(exchange: Exchange, line: bytes, needles: Needles) -> SecretLeakError | None:
    """Return an error if an authentication value is still there; it names the place, never the value."""
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
                f"Expected an exchange without secrets, got one with a value that authenticates in its {place} "
                f"(a {request.method} to {host}, role {facts.role}); it was not written. "
                "Keep the secret out of it, or call the model outside of the cassette"
            )
    return None
