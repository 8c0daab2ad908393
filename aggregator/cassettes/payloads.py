"""Decoding bodies: the JSON of a document or of each event, its tool fields, and content codings.

Content codings are gzip, deflate, br (package brotli) and zstd (package zstandard), each decompressed up to a limit.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import msgspec

# JSON, in one document or in events

_DATA = re.compile(rb"(?:(?<![^\r\n])|(?<=^\xef\xbb\xbf))data: ?([^\r\n]*)")
_PLAIN_DATA = re.compile(rb"^data: ?([^\n]*)", re.MULTILINE)  # the same if lines end in a line feed alone, and faster
_LINE = re.compile(rb"[^\r\n]+")
_EVENTS = (b"data:", b"event:", b":", b"id:", b"retry:")
_STREAMED = re.compile(r"event-?stream|stream\+json|ndjson|jsonl|json-?lines|json-seq", re.IGNORECASE)


def is_stream(headers: Mapping[str, str]) -> bool:
    """Return True if a reply with these headers is a stream of events, or of lines of JSON."""
    return _is_streamed(headers.get("content-type", ""))


@lru_cache(maxsize=256)
def _is_streamed(content_type: str) -> bool:
    return bool(_STREAMED.search(content_type))


def is_json(data: bytes) -> bool:
    """Return True if this is one JSON document."""
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def event_spans(body: bytes) -> list[tuple[int, int]]:
    """Return where the data of a stream's events, or lines of JSON, start and end; [] for any other body."""
    beginning = body[:64].lstrip(b"\xef\xbb\xbf\r\n\t ")
    if beginning.startswith(_EVENTS):
        data = _DATA if b"\r" in body or body.startswith(b"\xef") else _PLAIN_DATA
        return [match.span(1) for match in data.finditer(body)] or [(0, len(body))]
    if beginning[:1] not in (b"{", b"["):
        return []
    start = len(body) - len(body.lstrip(b"\r\n"))
    end = min((place for sign in b"\r\n" if (place := body.find(sign, start)) >= 0), default=len(body))
    if end > len(body) - 2 or not is_json(body[start:end]):  # one document, in one line or many
        return []
    lines = [match.span() for match in _LINE.finditer(body)]
    return lines if len(lines) > 1 else []


def decode_event(data: bytes) -> Any:
    """Return an event's JSON; its text if it is not JSON; None for anything else."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode(errors="replace") if len(data) < 1 << 20 and data.isascii() else None


# Arguments and results of tools

_ARGUMENTS = frozenset(
    {"arguments", "args", "parameters", "partial_json", "partial_arguments", "tool_input", "tool_output"}
    | {
        "functionCall",
        "functionResponse",
        "function_call",
        "function_response",
        "toolUse",
        "toolResult",
        "tool_results",
    }
)
"""Fields that hold a tool's arguments or its result, at OpenAI, Anthropic, Gemini, Bedrock and Cohere."""
_TOOL_KEYS = frozenset({"tool_call_id", "tool_use_id", "toolUseId", "call_id"})
_TOOL_ROLES = frozenset({"tool", "function", "ipython"})


def is_tool_path(path: tuple[str | int, ...]) -> bool:
    """Return True if a text at this path of an event is a piece of a tool's arguments; the path may have its type."""
    return any(part in _ARGUMENTS or (type(part) is str and ("arguments" in part or "tool" in part)) for part in path)


def tool_fields(data: bytes) -> frozenset[tuple[str, str]]:
    """Return the fields (name, text) that are only in arguments and results of tools.

    >>> sorted(tool_fields(b'{"password": "a", "messages": [{"role": "tool", "password": "mellon"}]}'))
    [('password', 'mellon'), ('role', 'tool')]
    """
    spans = event_spans(data) or [(0, len(data))]
    inside: set[tuple[str, str]] = set()
    outside: set[tuple[str, str]] = set()
    try:
        for start, end in spans:
            for name, text, in_tool in _fields(decode_event(data[start:end]), in_tool=False):
                (inside if in_tool else outside).add((name, text))
    except RecursionError:  # nested deeper than any tool's arguments
        return frozenset()
    return frozenset(inside - outside)


def _fields(value: Any, *, in_tool: bool) -> Iterator[tuple[str, str, bool]]:
    """Yield every text of a JSON value with its field's name, also inside JSON that is a text."""
    if isinstance(value, dict):
        in_tool = in_tool or _is_tool(value)
        for name, item in value.items():
            inner = in_tool or name in _ARGUMENTS
            if isinstance(item, str):
                yield name, item, inner
            yield from _fields(item, in_tool=inner)
    elif isinstance(value, list):
        for item in value:
            yield from _fields(item, in_tool=in_tool)
    elif isinstance(value, str) and value[:1] in ("{", "["):
        try:
            inside = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
            return
        yield from _fields(inside, in_tool=in_tool)


def _is_tool(value: Mapping[str, Any]) -> bool:
    """Return True for a call or a result of a tool, recognised by its type, its role or the call's id."""
    kind, role = value.get("type"), value.get("role")
    return (
        (isinstance(kind, str) and ("tool" in kind or "function_call" in kind))
        or (isinstance(role, str) and role in _TOOL_ROLES)
        or not _TOOL_KEYS.isdisjoint(value)
    )


# Content codings

NEEDED = {"br": "brotli>=1.2", "zstd": "zstandard"}
"""The package that each coding outside the standard library needs."""


LARGEST_INFLATED = 1 << 24
"""How much of a compressed body is searched for secrets."""


class TooLargeError(Exception):
    """A body decompresses to more than the limit."""


def decompressed(body: bytes, encoding: str, limit: int = sys.maxsize) -> tuple[bytes, str]:
    """Return the body without its content codings, and the coding that could not be decoded ("" for none).

    Some clients pass the raw body, others the decoded one: text has been decoded already. Raises TooLargeError above
    `limit` bytes.

    >>> import gzip
    >>> decompressed(gzip.compress(b"hello"), "gzip"), decompressed(b"hello", "gzip")
    ((b'hello', ''), (b'hello', ''))
    """
    for coding in reversed([part.strip().lower() for part in encoding.split(",") if part.strip()]):
        plain = _undo(coding, body, limit)
        if plain is None:
            return (body, "") if _is_text(body) else (body, coding)
        body = plain
    return body, ""


def _undo(coding: str, body: bytes, limit: int) -> bytes | None:
    """Return the body with one coding decoded; None if it is another coding, truncated, or needs a missing package."""
    try:
        match coding:
            case "gzip" | "x-gzip":
                return _inflated(body, 31, limit)
            case "deflate":
                plain = _inflated(body, 15, limit)
                return _inflated(body, -15, limit) if plain is None else plain  # some servers send it without a header
            case "br":
                return _unbrotlied(body, limit)
            case "zstd":
                return _unzstded(body, limit)
            case "identity":
                return body
    except TooLargeError:
        raise
    except Exception:  # noqa: BLE001 - each library has its own error for "not compressed at all"
        return None
    return None


def _inflated(body: bytes, wbits: int, limit: int) -> bytes | None:
    stream = zlib.decompressobj(wbits)
    try:
        plain = stream.decompress(body, limit)
    except zlib.error:
        return None
    if stream.unconsumed_tail:
        raise TooLargeError
    return plain if stream.eof else None


def _unbrotlied(body: bytes, limit: int) -> bytes | None:
    stream = import_module("brotli").Decompressor()
    pieces, size = [stream.process(body, output_buffer_limit=1 << 20)], 0
    while pieces[-1]:
        size += len(pieces[-1])
        if size > limit:
            raise TooLargeError
        if stream.is_finished():
            return b"".join(pieces)
        pieces.append(stream.process(b"", output_buffer_limit=1 << 20))
    return b"" if stream.is_finished() else None


def _unzstded(body: bytes, limit: int) -> bytes | None:
    with import_module("zstandard").ZstdDecompressor().stream_reader(body, read_across_frames=True) as stream:
        plain = bytes(stream.read(limit + 1) if limit < sys.maxsize else stream.readall())
    if len(plain) > limit:
        raise TooLargeError
    return plain or None


def _is_text(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def inflated(body: bytes) -> bytes:
    """Return the content of a body in gzip, zlib or raw deflate, up to a limit; b"" for any other body."""
    if body.isascii():
        return b""
    return next((plain for wbits in (47, -15) if (plain := _unpacked(body, wbits))), b"")


def _unpacked(body: bytes, wbits: int) -> bytes:
    """Return what can be decompressed, of all members of a gzip file."""
    plain = b""
    try:
        while body and len(plain) < LARGEST_INFLATED:
            member = zlib.decompressobj(wbits=wbits)
            plain += member.decompress(body, LARGEST_INFLATED - len(plain))
            body = member.unused_data
    except zlib.error:
        pass  # the rest is something else
    return plain
