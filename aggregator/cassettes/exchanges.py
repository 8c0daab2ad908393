"""One recorded exchange, and its one line in a journal.

A line is JSON and a YAML flow item at once, so that msgspec and stock vcrpy both read it. Our own facts
stand under `x`, beside `request` and `response`, where vcrpy does not look; the last of them is the sha256
of the line before it. A body that is no UTF-8 is `!!binary "…"`: YAML, not JSON, and the only exception.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.records import HTTPReply, HTTPRequest

_HASH = b',"sha256":"'
_END = b'"}}'
_TAIL = len(_HASH) + 64 + len(_END)
# what PyYAML refuses or folds although JSON allows it raw: DEL, C1 controls, U+2028, U+2029, U+FEFF, U+FFFE, U+FFFF
NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_ODD_STARTS = (b"\x7f", b"\xc2", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef")  # of those in UTF-8
_BINARY = re.compile(rb'("(?:[^"\\]|\\.)*")|!!binary ("[A-Za-z0-9+/=]*")')


class Facts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What we know beside request and response; the key `x` of an interaction.

    `ticket` counts the identical requests of one lineage in the order they were issued, `attempt` the answers
    to one of them, `order` all requests issued in this lineage. `chunks` are (bytes, milliseconds) of a stream.
    `error` is (class, message) of an attempt without an answer. `usage` holds tokens and cost as far as known.
    """

    lineage: str
    ticket: int = 0
    attempt: int = 0
    order: int = 0
    role: str = "agent"
    model: str = ""
    ms: float = 0.0
    at: str = ""
    usage: dict[str, int | float] = {}
    chunks: tuple[tuple[int, float], ...] = ()
    error: tuple[str, str] | None = None


class Exchange(Struct, frozen=True, kw_only=True):
    """A request, its answer and our facts. Header names are lower case."""

    request: HTTPRequest
    reply: HTTPReply
    facts: Facts


class Head(Struct, frozen=True, gc=False):
    """What the index needs of a line; the answer is skipped and not built."""

    request: _Request
    x: Place


class _Request(Struct, frozen=True, gc=False):
    method: str
    uri: str
    body: Any = ""


class Place(Struct, frozen=True, gc=False):
    """The part of the facts that says where in the run an exchange stands."""

    lineage: str
    ticket: int = 0
    attempt: int = 0
    order: int = 0
    sha256: str = ""


class _Status(Struct, frozen=True, gc=False):
    code: int
    message: str = ""


class _Body(Struct, frozen=True, gc=False):
    string: str | dict[str, str]


class _Response(Struct, frozen=True, gc=False):
    status: _Status
    headers: dict[str, list[str]]
    body: _Body


class Played(Struct, frozen=True, gc=False):
    """The part of the facts that a replay needs."""

    ms: float = 0.0
    chunks: tuple[tuple[int, float], ...] = ()
    error: tuple[str, str] | None = None


class _Answer(Struct, frozen=True, gc=False):
    response: _Response
    x: Played


class _WholeRequest(Struct, frozen=True):
    method: str
    uri: str
    headers: dict[str, list[str]] = {}
    body: Any = ""


class _Whole(Struct, frozen=True):
    request: _WholeRequest
    response: _Response
    x: Facts


_decode_head = msgspec.json.Decoder(Head).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_encode = msgspec.json.Encoder().encode

Buffer = bytes | memoryview


def encode_line(exchange: Exchange) -> bytes:
    """Return the exchange as one line, without a line break, with its hash."""
    request, reply = exchange.request, exchange.reply
    asked = {name: [value] for name, value in request.headers.items()}
    answered = {name: [value] for name, value in reply.headers.items()}
    body = _Body(_text(reply.body))
    line = _encode(
        _Whole(
            _WholeRequest(request.method, request.url, asked, _text(request.body)),
            _Response(_Status(reply.status, reply.reason), answered, body),
            exchange.facts,
        )
    )
    if not line.isascii() or b"\x7f" in line:
        line = _as_yaml(line)
    line = line[:-2]
    return b"%b%b%b%b" % (line, _HASH, sha256(line).hexdigest().encode(), _END)


def _as_yaml(line: bytes) -> bytes:
    """Escape what only JSON allows; most text beyond ASCII holds none of it."""
    if any(start in line for start in _ODD_STARTS):
        return NOT_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", line.decode()).encode()
    return line


def _text(body: bytes) -> Any:  # str, or YAML's own as msgspec.Raw
    try:
        return body.decode()
    except UnicodeDecodeError:
        return msgspec.Raw(b'!!binary "%b"' % base64.b64encode(body))


def line_is_whole(line: Buffer) -> bool:
    """Say whether the line is what was written: its hash is there and fits."""
    return bytes(line[-_TAIL:]) == b"".join((_HASH, sha256(line[:-_TAIL]).hexdigest().encode(), _END))


def line_hash(line: Buffer) -> str:
    """Return the hash that the line states."""
    return bytes(line[-_TAIL:][len(_HASH) : -len(_END)]).decode()


def decode_head(line: Buffer) -> Head:
    """Return what the index needs; raises msgspec.DecodeError or ValidationError."""
    try:
        return _decode_head(line)
    except msgspec.DecodeError:
        return _decode_head(_as_json(line))


def body_bytes(body: str | Mapping[str, str] | None) -> bytes:
    """Return a body as it was on the wire."""
    if isinstance(body, str):
        return body.encode()
    return base64.b64decode(body["!!binary"]) if body else b""


def decode_answer(line: Buffer) -> tuple[HTTPReply, Played]:
    """Return the recorded answer, marked as replayed, and what else a replay needs."""
    try:
        answer = _decode_answer(line)
    except msgspec.DecodeError:
        answer = _decode_answer(_as_json(line))
    return _reply(answer.response, answer.x), answer.x


def decode_line(line: Buffer) -> Exchange:
    """Return the whole exchange."""
    try:
        whole = _decode_whole(line)
    except msgspec.DecodeError:
        whole = _decode_whole(_as_json(line))
    request = HTTPRequest(
        method=whole.request.method,
        url=whole.request.uri,
        body=body_bytes(whole.request.body),
        headers={name: values[0] for name, values in whole.request.headers.items()},
    )
    return Exchange(request=request, reply=_reply(whole.response, whole.x), facts=whole.x)


def _reply(response: _Response, facts: Facts | Played) -> HTTPReply:
    return HTTPReply(
        status=response.status.code,
        body=body_bytes(response.body.string),
        headers={name: values[0] for name, values in response.headers.items()},
        reason=response.status.message,
        milliseconds=facts.ms,
        chunks=facts.chunks,
        replayed=True,
    )


def _as_json(line: Buffer) -> bytes:
    """Turn `!!binary "…"` into `{"!!binary":"…"}`, outside of strings only."""
    return _BINARY.sub(lambda match: match[1] or b'{"!!binary":%b}' % match[2], bytes(line))
