r"""One recorded exchange, and its one line in a journal.

    {"request":{...},"response":{...},"x":"{\"lineage\":...,\"key\":\"...\",\"sha256\":\"...\"}"}

A line is JSON and a YAML flow item at once, so that msgspec and stock vcrpy both read it. Our own facts are under `x`,
next to `request` and `response`, and ignored by vcrpy: as JSON in one text, since a mapping would cost vcrpy a third of
its loading time. They end with the digest of the request's bytes, by which a replay finds the line without reading the
rest, and the sha256 of the line up to there. A body that is not UTF-8 is `!!binary "…"`: YAML, not JSON, and the only
exception.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import DecodeError, Struct
from msgspec.structs import force_setattr, replace

from aggregator.cassettes.matching import key_of_request, raw_key
from aggregator.errors import CassetteDamagedError
from aggregator.records import HTTPReply, HTTPRequest

_RESPONSE = b'},"response":{"status":'  # neither this nor the next occurs in a text, whose quotes are escaped
_FACTS = b',"x":"'
_HASH = rb",\"sha256\":\""
_END = rb'\"}"}'
_TAIL = len(_HASH) + 64 + len(_END)
# characters that PyYAML refuses or folds although JSON allows them raw: DEL, C1 controls, U+2028, U+2029, U+FEFF,
# U+FFFE, U+FFFF
NOT_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_ODD_STARTS = (b"\x7f", b"\xc2", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef")  # of those characters in UTF-8
_BINARY = re.compile(rb'("(?:[^"\\]|\\.)*")|!!binary ("[A-Za-z0-9+/=]*")')


# ---- an exchange and its facts


class Facts(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The facts of an exchange in addition to request and response; the key `x` of an interaction.

    `ticket` counts the identical requests of one lineage in the order they were issued, `attempt` the answers to one of
    them, `order` all requests of this lineage. `chunks` are (bytes, milliseconds) of a stream. `error` is (class,
    message) of an attempt without an answer. `usage` has tokens and cost as far as known. `redacted` is a short digest
    of the redacted parts of the request's body, which orders exchanges whose requests are otherwise equal. `key` is the
    digest of the request's bytes as a journal states it, b"" outside of a line.
    """

    lineage: str
    ticket: int = 0
    attempt: int = 0
    order: int = 0
    role: str = "agent"
    branch: str = ""
    model: str = ""
    ms: float = 0.0
    at: str = ""
    usage: dict[str, int | float] = {}
    chunks: tuple[tuple[int, float], ...] = ()
    error: tuple[str, str] | None = None
    redacted: str = ""
    key: bytes = b""


class Exchange(Struct, frozen=True, kw_only=True):
    """A request, its answer and our facts. Header names are lower case."""

    request: HTTPRequest
    reply: HTTPReply
    facts: Facts


class _Status(Struct, frozen=True, gc=False):
    code: int
    message: str = ""


class _Body(Struct, frozen=True, gc=False):
    string: str | dict[str, str]


class _Response(Struct, frozen=True, gc=False):
    status: _Status
    headers: dict[str, list[str]]
    body: _Body


class _WholeRequest(Struct, frozen=True):
    method: str
    uri: str
    headers: dict[str, list[str]] = {}
    body: str | dict[str, str] = ""


class _Whole(Struct, frozen=True):
    request: _WholeRequest
    response: _Response


_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_response = msgspec.json.Decoder(_Response).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_facts = msgspec.json.Decoder(Facts).decode
_encode = msgspec.json.Encoder().encode

Buffer = bytes | memoryview


# ---- exchange -> line


def encode_line(exchange: Exchange) -> bytes:
    """Return the exchange as one line, without a line break, with its key and its hash."""
    request, reply = exchange.request, exchange.reply
    answered = {name: value.split("\n") for name, value in reply.headers.items()}
    response = _Response(_Status(reply.status, reply.reason), answered, _Body(_text(reply.body)))
    facts = replace(exchange.facts, key=raw_key(request.method, request.url, request.body))
    line = b"".join(
        (
            _opening(request.method, request.url, tuple(request.headers.items())),
            _encode(_text(request.body)),
            b'},"response":',
            _encode(response),
            _FACTS,
            _encode(facts)[:-1].replace(b"\\", rb"\\").replace(b'"', rb"\""),
        )
    )
    if not line.isascii() or b"\x7f" in line:
        line = _as_yaml(line)
    return b"".join((line, _HASH, sha256(line).hexdigest().encode(), _END))


@lru_cache(maxsize=256)
def _opening(method: str, url: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Return the line up to the request's body; most are repeated."""
    request = {"method": method, "uri": url, "headers": {name: [value] for name, value in headers}}
    return b'{"request":%b,"body":' % _encode(request)[:-1]


def _as_yaml(line: bytes) -> bytes:
    """Escape characters that only JSON allows; most text beyond ASCII has none."""
    if any(start in line for start in _ODD_STARTS):
        return NOT_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", line.decode()).encode()
    return line


def _text(body: bytes) -> Any:  # str, or YAML's own as msgspec.Raw
    try:
        return body.decode()
    except UnicodeDecodeError:
        return msgspec.Raw(b'!!binary "%b"' % base64.b64encode(body))


# ---- line -> exchange


def line_is_whole(line: Buffer) -> bool:
    """Return True if the line is unchanged: it has its hash, and the hash fits."""
    return bytes(line[-_TAIL:]) == b"".join((_HASH, sha256(line[:-_TAIL]).hexdigest().encode(), _END))


def line_hash(line: Buffer) -> str:
    """Return the hash in the line."""
    return bytes(line[-_TAIL:][len(_HASH) : -len(_END)]).decode()


def find_parts(data: bytes, start: int, end: int) -> tuple[int, int]:
    """Return the positions of the answer and our facts in the line from `start` to `end`; raises ValueError."""
    answer = data.find(_RESPONSE, start, end) + len(b'},"response":')
    facts = data.rfind(_FACTS, answer, end)
    if facts < 0 or answer < start + len(b'},"response":'):
        raise ValueError("a line without request, response and the facts in x")
    return answer, facts


def decode_facts(data: bytes, facts: int, end: int) -> Facts:
    """Return the facts of a line, which begin at `facts`; raises msgspec.DecodeError."""
    return _decode_facts(_decode_text(data[facts + len(_FACTS) - 1 : end - 1]))


def body_bytes(body: str | Mapping[str, str] | None) -> bytes:
    """Return a body as it was sent."""
    if isinstance(body, str):
        return body.encode()
    return base64.b64decode(body["!!binary"]) if body else b""


def decode_line(line: bytes) -> Exchange:
    """Return the whole exchange."""
    try:
        whole = _decode_whole(line)
    except msgspec.DecodeError:
        whole = _decode_whole(_as_json(line))
    facts = decode_facts(line, line.rindex(_FACTS), len(line))
    request = HTTPRequest(
        method=whole.request.method,
        url=whole.request.uri,
        body=body_bytes(whole.request.body),
        headers={name: values[0] for name, values in whole.request.headers.items()},
    )
    return Exchange(request=request, reply=_reply(whole.response, facts), facts=replace(facts, key=b""))


def _lines(values: list[str]) -> str:
    """Return the values of several headers of one name as lines of one text."""
    if not values:
        raise ValueError("a header without a value")
    return "\n".join(values)


def _reply(response: _Response, facts: Facts) -> HTTPReply:
    """Return a recorded answer, marked as replayed."""
    status, headers = response.status, {}
    for name, values in response.headers.items():
        headers[name] = values[0] if len(values) == 1 else _lines(values)
    return HTTPReply(
        status=status.code,
        body=body_bytes(response.body.string),
        headers=headers,
        reason=status.message,
        milliseconds=facts.ms,
        chunks=facts.chunks,
        replayed=True,
    )


def _as_json(line: bytes) -> bytes:
    """Turn `!!binary "…"` into `{"!!binary":"…"}`, outside of strings only."""
    return _BINARY.sub(lambda match: match[1] or b'{"!!binary":%b}' % match[2], line)


State = Literal["closed", "open", "foreign"]
REMEDY = (
    "the file was cut or edited: restore it from version control, accept an edit of your own "
    "(aggregator cassette accept), or delete it and record again"
)
UNREADABLE = (DecodeError, ValueError, KeyError, RecursionError)
"""Errors of decoding a line that we did not write, although its hash is right."""


# ---- rows of a recording


class Row(Struct, frozen=True, gc=False):
    """One recorded exchange: its line is `data[start:end]`, in which answer and facts begin at `answer_at`, `facts_at`.

    The answer is decoded when it is played.
    """

    data: bytes
    start: int
    answer_at: int
    facts_at: int
    end: int
    facts: Facts
    known_key: bytes = b""

    @property
    def line(self) -> bytes:
        """The line, as in a journal."""
        return self.data[self.start : self.end]

    @property
    def key(self) -> bytes:
        """The canonical key of its request; computed when first needed, as most replays send the recorded bytes."""
        if not self.known_key:
            force_setattr(self, "known_key", key_of_request(self.exchange().request))
        return self.known_key

    def reply(self) -> HTTPReply:
        """Decode the answer alone; raises CassetteDamagedError."""
        answer = self.data[self.answer_at : self.facts_at]
        try:
            try:
                response = _decode_response(answer)
            except msgspec.DecodeError:
                response = _decode_response(_as_json(answer))
            return _reply(response, self.facts)
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def exchange(self) -> Exchange:
        """Decode the whole row; raises CassetteDamagedError."""
        try:
            return decode_line(self.line)
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CassetteDamagedError:
        facts = self.facts
        return CassetteDamagedError(
            f"Expected an exchange, got {error} - in lineage {facts.lineage!r}, ticket {facts.ticket}; {REMEDY}"
        )


class Recording(Struct, frozen=True, kw_only=True):
    """The content of a cassette. `kept` is the number of valid bytes of an open journal, `findings` are the repairs."""

    rows: tuple[Row, ...]
    state: State
    layout: Literal["journal", "readable", "foreign"]
    findings: tuple[str, ...] = ()
    kept: int = 0
    size: int = 0
    files: tuple[Path, ...] = ()


NOTHING = Recording(rows=(), state="open", layout="journal")


def index_spans(data: bytes, spans: Iterable[tuple[int, int]]) -> Iterator[Row]:
    """Index the lines that start and end there; they are whole, so the key in each is its request's."""
    for start, end in spans:
        answer, facts = find_parts(data, start, end)
        yield Row(data, start, answer, facts, end, decode_facts(data, facts, end))


def index_lines(lines: Iterable[bytes]) -> Iterator[Row]:
    """Index separate lines."""
    for line in lines:
        yield from index_spans(line, [(0, len(line))])


def exchange_id(row: Row) -> str:
    """Return the name of an exchange within its cassette: lineage, ticket, attempt and the start of its key."""
    facts = row.facts
    return f"{facts.lineage or '-'} #{facts.ticket}.{facts.attempt} {row.key.hex()[:12]}"
