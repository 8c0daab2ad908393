"""Streamed replies (server-sent events): texts that a stream cuts into pieces, and where its chunks end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.cassettes.secrets import (
    PLACEHOLDER,
    Edit,
    Needles,
    apply_edits,
    has_hidden_text,
    is_secret_field,
    secret_edits,
)
from aggregator.checks import is_number

Chunks = tuple[tuple[int, float], ...]
"""(length in bytes, milliseconds since the request was sent) of each piece as it came."""

_DATA = re.compile(rb"(?:(?<![^\r\n])|(?<=^\xef\xbb\xbf))data: ?([^\r\n]*)")
_LINE = re.compile(rb"[^\r\n]+")
_EVENTS = (b"data:", b"event:", b":", b"id:", b"retry:")
_STREAMED = re.compile(r"event-stream|stream\+json|ndjson|jsonl|json-?lines|json-seq", re.IGNORECASE)
_encode = msgspec.json.Encoder().encode
_Path = tuple[str | int, ...]


class _Piece(Struct, frozen=True, gc=False):
    """A text of an event: where it stands, and where it belongs."""

    event: int
    path: _Path
    key: _Path
    text: bytes


def is_stream(headers: Mapping[str, str]) -> bool:
    """Say whether a reply with these headers is a stream of events, or of lines of JSON."""
    return _is_streamed(headers.get("content-type", ""))


@lru_cache(maxsize=256)
def _is_streamed(content_type: str) -> bool:
    return bool(_STREAMED.search(content_type))


def is_form(headers: Mapping[str, str]) -> bool:
    """Say whether a body with these headers is a form."""
    return "x-www-form-urlencoded" in headers.get("content-type", "").lower()


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
        if has_hidden_text(data) and isinstance(inner := _decoded(data), dict | list):  # JSON within the JSON
            clean = _rebuilt(inner, needles)
            data = data if clean == inner else _encode(clean)
        return apply_edits(data, secret_edits(data, needles)).decode(errors="replace")
    if isinstance(value, dict):
        pairs = ((_rebuilt(name, needles), item) for name, item in value.items())
        return {
            name: _blank(item, needles) if is_secret_field(name) else _rebuilt(item, needles) for name, item in pairs
        }
    return [_rebuilt(item, needles) for item in value] if isinstance(value, list) else value


def _blank(value: Any, needles: Needles) -> Any:
    """Return what stands in the place of a field with a secret's name."""
    if isinstance(value, list):
        return [_blank(item, needles) for item in value]
    if isinstance(value, str):
        return value and PLACEHOLDER
    return 0 if is_number(value) else _rebuilt(value, needles)


def hidden_edits(body: bytes, needles: Needles) -> list[Edit]:
    """Return what to replace where a secret is cut in pieces by a stream, or written with JSON escapes.

    The texts that stand at the same place of each event are joined, as a client joins them. An event that
    changes is written anew; the others keep their bytes.
    """
    is_hidden = has_hidden_text(body)
    spans = _event_spans(body) or ([(0, len(body))] if is_hidden else [])
    events = [_decoded(body[start:end]) for start, end in spans]
    changed = _rejoin(events, needles)
    if is_hidden:  # names too
        for index, event in enumerate(events):
            if not isinstance(event, str) and (clean := _rebuilt(event, needles)) != event:
                events[index] = clean
                changed.add(index)
    return [
        (*spans[index], events[index].encode() if isinstance(events[index], str) else _encode(events[index]))
        for index in sorted(changed)
    ]


def _event_spans(body: bytes) -> list[tuple[int, int]]:
    """Return where the data of a stream's events stands, and the lines of JSON of one without events; [] for others."""
    beginning = body[:64].lstrip(b"\xef\xbb\xbf\r\n\t ")
    if beginning.startswith(_EVENTS):
        return [match.span(1) for match in _DATA.finditer(body)] or [(0, len(body))]
    if beginning[:1] not in (b"{", b"[") or b"\n" not in body.strip():
        return []
    lines = [match.span() for match in _LINE.finditer(body)]
    return lines if is_json(body[slice(*lines[0])]) else []


def _rejoin(events: list[Any], needles: Needles) -> set[int]:
    """Redact the texts that stand at the same place of each event as one, in place; return which events changed.

    Answers side by side are joined each by itself too, told apart by the index beside them. Both, as some servers
    count their events by an `index`.
    """
    pieces = list(_pieces(events))
    changed = _redact_groups(events, pieces, [piece.path for piece in pieces], needles)
    if len({piece.key for piece in pieces}) > len({piece.path for piece in pieces}):
        pieces = list(_pieces(events)) if changed else pieces
        changed |= _redact_groups(events, pieces, [piece.key for piece in pieces], needles)
    return changed


def _redact_groups(events: list[Any], pieces: list[_Piece], names: list[_Path], needles: Needles) -> set[int]:
    """Redact the pieces of each name as one text."""
    groups: dict[_Path, list[_Piece]] = {}
    for name, piece in zip(names, pieces, strict=True):
        groups.setdefault(name, []).append(piece)
    changed = set()
    for group in groups.values():
        edits = secret_edits(b"".join(piece.text for piece in group), needles)
        for piece, text in _rewritten(group, edits) if edits else ():
            events[piece.event] = _with(events[piece.event], piece.path, text.decode(errors="replace"))
            changed.add(piece.event)
    return changed


def _pieces(events: list[Any]) -> Iterator[_Piece]:
    for index, event in enumerate(events):
        for path, key, text in _texts(event):
            yield _Piece(index, path, key, text.encode(errors="surrogatepass"))


def _decoded(data: bytes) -> Any:
    """Return an event's JSON, or its text where it is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode(errors="replace") if len(data) < 1 << 20 and data.isascii() else None


def _texts(value: Any, path: _Path = (), key: _Path = ()) -> Iterator[tuple[_Path, _Path, str]]:
    """Yield every text with its place, and with that place told apart by the indices that stand beside it."""
    if isinstance(value, str):
        yield path, key, value
    elif isinstance(value, dict):
        indices = tuple(
            f"{name}={item}" for name, item in value.items() if name.endswith("index") and type(item) is int
        )
        for name, item in value.items():
            yield from _texts(item, (*path, name), (*key, *indices, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index), (*key, index))


def _with(value: Any, path: _Path, text: str) -> Any:
    """Return the value with another text at one place."""
    if not path:
        return text
    inner: Any = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = text
    return value


def _rewritten(pieces: list[_Piece], edits: list[Edit]) -> Iterator[tuple[_Piece, bytes]]:
    """Yield the pieces that change: the first one an edit touches takes the replacement, others lose their part."""
    offset = 0
    for piece in pieces:
        end = offset + len(piece.text)
        own = [
            (max(start, offset) - offset, min(stop, end) - offset, mark if start >= offset else b"")
            for start, stop, mark in edits
            if start < end and stop > offset
        ]
        if own and (new := apply_edits(piece.text, own)) != piece.text:
            yield piece, new
        offset = end
