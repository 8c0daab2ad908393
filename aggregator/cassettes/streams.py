"""Finds secrets that a stream cuts into pieces, or that JSON escapes hide: texts are joined as a client joins them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from operator import itemgetter
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.cassettes.credentials import (
    PLACEHOLDER,
    USUAL,
    Needles,
    Redaction,
    hides_value,
    is_secret_field,
    looks_secret,
)
from aggregator.cassettes.payloads import decode_event, event_spans, is_tool_path
from aggregator.cassettes.secrets import Edit, apply_edits, has_hidden_text, secret_edits, suspicious, unescape
from aggregator.checks import is_number

_encode = msgspec.json.Encoder().encode
_Path = tuple[str | int, ...]
_PLAIN = frozenset({int, float, bool, type(None)})


class _Piece(Struct, frozen=True, gc=False):
    """A text of an event: its place, the text to which it belongs, and the same if indices distinguish answers."""

    event: int
    path: _Path
    name: _Path
    key: _Path
    text: bytes


def hidden_edits(body: bytes, needles: Needles, policy: Redaction = USUAL) -> list[Edit]:
    """Return the edits for secrets that a stream cuts into pieces, or that are written with JSON escapes.

    The texts at the same place of each event are joined, as a client joins them. An event that changes is rewritten;
    the others keep their bytes.
    """
    is_hidden = has_hidden_text(body) and suspicious(unescape(body), needles, policy)
    spans = event_spans(body) or ([(0, len(body))] if is_hidden else [])
    if not spans:
        return []
    events = [decode_event(body[start:end]) for start, end in spans]
    changed = _redact_joined(events, needles, policy)
    if is_hidden:  # names too
        for index, event in enumerate(events):
            if not isinstance(event, str) and (clean := redact_value(event, needles, policy)) != event:
                events[index] = clean
                changed.add(index)
    return [
        (*spans[index], events[index].encode() if isinstance(events[index], str) else _encode(events[index]))
        for index in sorted(changed)
    ]


# A quick look at streams


def is_clean_stream(body: bytes, needles: Needles, policy: Redaction = USUAL) -> bool:
    """Return True for a stream that certainly has no secret, neither in one event nor joined.

    Checks the texts at each place of the events, joined, the names of their fields, and everything outside of events.
    """
    spans = event_spans(body)
    if not spans:
        return False
    borders = [0, *chain.from_iterable(spans), len(body)]
    rest = list({body[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True)})
    kinds: defaultdict[object, tuple[list[bytes], list[Any]]] = defaultdict(lambda: ([], []))
    for text in [body[start:end] for start, end in spans]:
        event = decode_event(text)
        kind = event.get("type") if type(event) is dict else None  # deltas of two types are two texts
        texts, events = kinds[kind if type(kind) is str else None]
        texts.append(text)
        events.append(event)
    for texts, events in kinds.values():
        if len(events) == 1 or None in events:
            rest += texts
        if len(events) > 1:
            rest += _columns(events)
    data = b"\n".join(rest)
    return not suspicious(data, needles, policy) and not has_hidden_text(data)


def _columns(values: list[Any]) -> Iterator[bytes]:
    """Yield the texts at the same place of all values, joined, and the names of their fields."""
    if type(values[0]) is str and values.count(values[0]) == len(values):
        yield values[0].encode(errors="surrogatepass")
        return
    kinds = set(map(type, values))
    by_kind: list[list[Any]] = [
        values if kinds == {kind} else [value for value in values if type(value) is kind] if kind in kinds else []
        for kind in (str, dict, list)
    ]
    texts, maps, lists = by_kind
    if texts:
        yield "".join(texts).encode(errors="surrogatepass")
    if maps:
        yield from _columns_of_maps(maps)
    for place in range(max(map(len, lists), default=0)):
        yield from _columns([value[place] for value in lists if place < len(value)])


def _columns_of_maps(maps: list[dict[str, Any]]) -> Iterator[bytes]:
    columns = _by_name(maps)
    yield "".join(f'"{name}":' for name in columns).encode(errors="surrogatepass")
    for name, column in columns.items():
        if type(column[0]) is str or not _PLAIN.issuperset(map(type, column)):
            yield from _columns(column)
        elif name.endswith("index") and 1 < len(set(column)) < len(column):
            for index in set(column):  # answers in parallel
                same = [{key: value[key] for key in value if key != name} for value in maps if value.get(name) == index]
                yield from _columns(same)


def _by_name(maps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each name, of the maps that have it; most have the same names."""
    names = maps[0]
    if set(map(len, maps)) == {len(names)}:
        with suppress(KeyError):
            return {name: list(map(itemgetter(name), maps)) for name in names}
    every = dict.fromkeys(chain.from_iterable(maps))
    return {name: [value[name] for value in maps if name in value] for name in every}


# The thorough look


def redact_document(data: bytes, needles: Needles, policy: Redaction = USUAL) -> bytes:
    """Return a rewritten JSON document, every text in it redacted by itself."""
    return _encode(redact_value(msgspec.json.decode(data), needles, policy))


def redact_value(value: Any, needles: Needles, policy: Redaction, *, in_tool: bool = False) -> Any:
    """Return a JSON value with every text in it redacted by itself, and JSON within a text as well."""
    if isinstance(value, str):
        data = value.encode(errors="surrogatepass")
        if has_hidden_text(data) and isinstance(inner := decode_event(data), dict | list):
            clean = redact_value(inner, needles, policy, in_tool=in_tool)
            data = data if clean == inner else _encode(clean)
        edits = secret_edits(data, needles, policy, in_tool=in_tool or None)
        return apply_edits(data, edits).decode(errors="replace")
    if isinstance(value, dict):
        found = {}
        for name, item in value.items():
            inside = in_tool or is_tool_path((name,))
            if isinstance(item, str) and hides_value(name, item, policy, in_tool=inside):
                item = PLACEHOLDER  # noqa: PLW2901 - the value as it is written
            elif is_number(item) and name.lower() in policy.fields:
                item = 0  # noqa: PLW2901 - as above
            elif isinstance(item, list) and is_secret_field(name):
                item = [PLACEHOLDER if isinstance(one, str) and looks_secret(one) else one for one in item]  # noqa: PLW2901 - as above
            found[redact_value(name, needles, policy)] = redact_value(item, needles, policy, in_tool=inside)
        return found
    return (
        [redact_value(item, needles, policy, in_tool=in_tool) for item in value] if isinstance(value, list) else value
    )


def _redact_joined(events: list[Any], needles: Needles, policy: Redaction) -> set[int]:
    """Redact the texts at the same place of each event as one, in place; return which events changed.

    Parallel answers are also joined separately, distinguished by the index next to them. Both are done because some
    servers count their events by an `index`.
    """
    pieces = list(_pieces(events))
    changed = _redact_groups(events, pieces, [piece.name for piece in pieces], needles, policy)
    if len({piece.key for piece in pieces}) > len({piece.name for piece in pieces}):
        pieces = list(_pieces(events)) if changed else pieces
        changed |= _redact_groups(events, pieces, [piece.key for piece in pieces], needles, policy)
    return changed


def _redact_groups(
    events: list[Any], pieces: list[_Piece], names: list[_Path], needles: Needles, policy: Redaction
) -> set[int]:
    """Redact the pieces of each name as one text."""
    groups: dict[_Path, list[_Piece]] = {}
    for name, piece in zip(names, pieces, strict=True):
        groups.setdefault(name, []).append(piece)
    changed = set()
    for name, group in groups.items():
        in_tool = is_tool_path(name) or None
        edits = secret_edits(b"".join(piece.text for piece in group), needles, policy, in_tool=in_tool)
        for piece, text in _rewrite(group, edits) if edits else ():
            events[piece.event] = _with(events[piece.event], piece.path, text.decode(errors="replace"))
            changed.add(piece.event)
    return changed


def _pieces(events: list[Any]) -> Iterator[_Piece]:
    for index, event in enumerate(events):
        kind = event.get("type") if isinstance(event, dict) else None
        kinds = (kind,) if isinstance(kind, str) else ()  # deltas of text and of arguments are two texts
        for path, key, text in _texts(event):
            yield _Piece(index, path, (*kinds, *path), (*kinds, *key), text.encode(errors="surrogatepass"))


def _texts(value: Any, path: _Path = (), key: _Path = ()) -> Iterator[tuple[_Path, _Path, str]]:
    """Yield every text with its place, and with that place extended by the indices next to it."""
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


def _rewrite(pieces: list[_Piece], edits: list[Edit]) -> Iterator[tuple[_Piece, bytes]]:
    """Yield the changed pieces: the first one that an edit touches gets the replacement, others lose their part."""
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
