"""Secrets that a stream splits into chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from aggregator.cassettes.payloads import is_stream
from aggregator.cassettes.redaction import redact_body
from aggregator.cassettes.secrets import needles_of

NEEDLES = needles_of(frozenset({"MYKEY-ABCDEF-9999"}))
PIECES = ("key MYKEY-", "ABCDEF-", "9999 end")


def sse(events: Iterable[Any], line_end: str = "\n") -> bytes:
    return "".join(f"data: {json.dumps(event)}{line_end}{line_end}" for event in events).encode()


def choice(index: int, text: str) -> Any:
    return {"choices": [{"index": index, "delta": {"content": text}}]}


PLAIN = [choice(0, piece) for piece in PIECES]


@pytest.mark.parametrize(
    "body",
    [
        sse(PLAIN),
        b"\n" + sse(PLAIN),
        b"\xef\xbb\xbf" + sse(PLAIN),
        sse(PLAIN, "\r\n"),
        sse(PLAIN, "\r"),
        sse([event for piece in PIECES for event in (choice(0, piece), choice(1, "hello"))]),
        sse([{"index": number, "token": {"text": piece}} for number, piece in enumerate(PIECES)]),
        "".join(f"{json.dumps({'message': {'content': piece}})}\n" for piece in PIECES).encode(),
        b'{"a": 1}\n{"m": "\\u004dYKEY-ABCDEF-9999"}\n',
    ],
    ids=["plain", "line break", "BOM", "CRLF", "CR", "two answers", "counted events", "NDJSON", "NDJSON with escapes"],
)
def test_a_key_split_by_a_stream_leaked(body: bytes) -> None:
    """Chunks of any format are joined as a client joins them."""
    clean = redact_body(body, NEEDLES)[0]
    assert b"ABCDEF" not in clean
    assert b"REDACTED" in clean
    assert clean.count(b"hello") == body.count(b"hello")
    assert redact_body(clean, NEEDLES)[0] == clean


def test_a_password_in_streamed_arguments_that_end_early_leaked() -> None:
    """The arguments of a tool call are JSON in chunks, here without an end."""
    events = [
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}}]}
        for piece in ('{"pass', 'word": "hun', "ter2-hun")
    ]
    clean = redact_body(sse(events), ())[0]
    assert b"hun" not in clean
    assert b"ter2" not in clean


def test_a_stream_without_secrets_keeps_its_bytes() -> None:
    """Events are rewritten only if they change."""
    for body in (sse(PLAIN), sse(PLAIN, "\r"), b'{"a":  1}\n{"b":  2}\n'):
        assert redact_body(body, ())[0] == body


@pytest.mark.parametrize(
    ("content_type", "streamed"),
    [
        *(("Text/Event-Stream; charset=utf-8", True), ("application/x-ndjson", True), ("application/jsonl", True)),
        *(("application/json", False), ("", False)),
    ],
)
def test_streams_are_recognised_by_their_type(content_type: str, streamed: bool) -> None:
    """Its case is ignored."""
    assert is_stream({"content-type": content_type}) is streamed
