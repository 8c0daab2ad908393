"""The JSON in a body: one document, or one for each event of a stream; and which of its fields belong to tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec

_DATA = re.compile(rb"(?:(?<![^\r\n])|(?<=^\xef\xbb\xbf))data: ?([^\r\n]*)")
_LINE = re.compile(rb"[^\r\n]+")
_EVENTS = (b"data:", b"event:", b":", b"id:", b"retry:")
_STREAMED = re.compile(r"event-stream|stream\+json|ndjson|jsonl|json-?lines|json-seq", re.IGNORECASE)


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
        return _data_spans(body) or [(0, len(body))]
    if beginning[:1] not in (b"{", b"["):
        return []
    first = _LINE.search(body)
    if first is None or first.end() > len(body) - 2 or not is_json(first[0]):  # one document, in one line or many
        return []
    lines = [match.span() for match in _LINE.finditer(body)]
    return lines if len(lines) > 1 else []


def _data_spans(body: bytes) -> list[tuple[int, int]]:
    if b"\r" in body or body.startswith(b"\xef"):
        return [match.span(1) for match in _DATA.finditer(body)]
    spans, start = [], 0
    for line in body.split(b"\n"):
        end = start + len(line)
        if line.startswith(b"data:"):
            spans.append((start + (6 if line[5:6] == b" " else 5), end))
        start = end + 1
    return spans


def decode_event(data: bytes) -> Any:
    """Return an event's JSON; its text where it is none; None for what is neither."""
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
"""Fields that hold a tool's arguments or its result, in the words of OpenAI, Anthropic, Gemini, Bedrock and Cohere."""
_TOOL_KEYS = frozenset({"tool_call_id", "tool_use_id", "toolUseId", "call_id"})
_TOOL_ROLES = frozenset({"tool", "function", "ipython"})


def is_tool_path(path: tuple[str | int, ...]) -> bool:
    """Return True if a text at this place of an event is a piece of a tool's arguments; the path may name its type."""
    return any(part in _ARGUMENTS or (type(part) is str and ("arguments" in part or "tool" in part)) for part in path)


def tool_fields(data: bytes) -> frozenset[tuple[str, str]]:
    """Return the fields (name, text) that stand in arguments and results of tools, and nowhere else in a body.

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
    """Yield every text of a JSON value with its field's name; also of JSON that a text holds."""
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
    """Return True for a call or a result of a tool, which say so by their type, their role or the call's id."""
    kind, role = value.get("type"), value.get("role")
    return (
        (isinstance(kind, str) and ("tool" in kind or "function_call" in kind))
        or (isinstance(role, str) and role in _TOOL_ROLES)
        or not _TOOL_KEYS.isdisjoint(value)
    )
