"""Streamed replies (server-sent events): texts that a stream cuts into pieces, and where its chunks end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from aggregator.cassettes.secrets import (
    PLACEHOLDER,
    Edit,
    Needles,
    apply_edits,
    has_hidden_text,
    is_secret_field,
    secret_edits,
)

Chunks = tuple[tuple[int, float], ...]
"""(length in bytes, milliseconds since the request was sent) of each piece as it came."""

_DATA = re.compile(rb"^data: ?(.*?)\r?$", re.MULTILINE)
_encode = msgspec.json.Encoder().encode
_Path = tuple[str | int, ...]


def is_stream(headers: Mapping[str, str]) -> bool:
    """Say whether a reply with these headers is a stream of events."""
    return "event-stream" in headers.get("content-type", "")


def is_json(data: bytes) -> bool:
    """Say whether this is one JSON document."""
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def rebuilt(data: bytes, needles: Needles) -> bytes:
    """Return a JSON document written anew, every text in it redacted by itself."""
    return _encode(_rebuilt(msgspec.json.decode(data), needles))


def _rebuilt(value: Any, needles: Needles) -> Any:
    if isinstance(value, str):
        data = value.encode(errors="surrogatepass")
        return apply_edits(data, secret_edits(data, needles)).decode(errors="replace")
    if isinstance(value, dict):
        pairs = ((_rebuilt(name, needles), item) for name, item in value.items())
        return {
            name: PLACEHOLDER if isinstance(item, str) and is_secret_field(name) else _rebuilt(item, needles)
            for name, item in pairs
        }
    return [_rebuilt(item, needles) for item in value] if isinstance(value, list) else value


def hidden_edits(body: bytes, needles: Needles) -> list[Edit]:
    """Return what to replace where a secret is cut in pieces by a stream, or written with JSON escapes.

    The texts that stand at the same place of each event are joined, as a client joins them. An event that
    changes is written anew; the others keep their bytes.
    """
    streamed = body.startswith((b"data:", b"event:", b":", b"id:", b"retry:"))
    if not streamed and not has_hidden_text(body):
        return []
    spans = [match.span(1) for match in _DATA.finditer(body)] if streamed else []
    spans = spans or [(0, len(body))]
    events = [_decoded(body[start:end]) for start, end in spans]
    pieces: dict[_Path, list[tuple[int, bytes]]] = {}
    for index, event in enumerate(events):
        for path, text in _texts(event):
            pieces.setdefault(path, []).append((index, text.encode(errors="surrogatepass")))
    changed: set[int] = set()
    for path, parts in pieces.items():
        edits = secret_edits(b"".join(text for _, text in parts), needles)
        for index, piece in _rewritten(parts, edits) if edits else ():
            events[index] = _with(events[index], path, piece.decode(errors="replace"))
            changed.add(index)
    return [
        (*spans[index], events[index].encode() if isinstance(events[index], str) else _encode(events[index]))
        for index in sorted(changed)
    ]


def _decoded(data: bytes) -> Any:
    """Return an event's JSON, or its text where it is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode(errors="replace") if len(data) < 1 << 20 and data.isascii() else None


def _texts(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, str]]:
    """Yield every text with its place."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))


def _with(value: Any, path: _Path, text: str) -> Any:
    """Return the value with another text at one place."""
    if not path:
        return text
    inner: Any = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = text
    return value


def _rewritten(parts: list[tuple[int, bytes]], edits: list[Edit]) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces that change: the first one an edit touches takes the replacement, others lose their part."""
    offset = 0
    for index, text in parts:
        end = offset + len(text)
        own = [
            (max(start, offset) - offset, min(stop, end) - offset, mark if start >= offset else b"")
            for start, stop, mark in edits
            if start < end and stop > offset
        ]
        if own and (new := apply_edits(text, own)) != text:
            yield index, new
        offset = end
