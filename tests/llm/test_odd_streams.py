"""Streams that keep a connection open without an answer, split a character, or use an uncommon content coding."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from llm_fakes import QUESTION, answer, chunk, read_request, serving

from aggregator import LLM
from aggregator.errors import APIConnectionError, APITimeoutError
from aggregator.llm.retry import RetryPolicy
from aggregator.llm.transport import AiohttpTransport
from aggregator.records import HTTPReply

AT_ONCE = RetryPolicy(first_delay=0.001)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DELTA = b'data: {"choices": [{"index": 0, "delta": {"content": "hello"}}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


def client(url: str, model: str = "m", **options: Any) -> LLM:
    return LLM(model, base_url=url, api_key="a-key-of-the-user", retry=AT_ONCE, transport=AiohttpTransport(), **options)


@pytest.mark.parametrize(
    ("model", "silence"),
    [
        ("m", b": keep-alive\n\n"),
        ("m", b": OPENROUTER PROCESSING\n\n"),
        ("m", b"\n"),
        ("m", b": half of a comment"),
        ("anthropic/m", b'event: ping\ndata: {"type": "ping"}\n\n'),
        ("responses", b'event: keepalive\ndata: {"type": "keepalive"}\n\n'),
    ],
)
async def test_a_stream_of_comments_alone_never_ended(model: str, silence: bytes) -> None:
    """Comments and pings keep a connection open; they are not progress of the answer."""
    requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_request(reader)
        requests += 1
        writer.write(HEAD)
        while True:
            writer.write(chunk(silence))
            await writer.drain()
            await asyncio.sleep(0.05)

    options: dict[str, Any] = {"api": "responses"} if model == "responses" else {}
    async with (
        serving(handle) as url,
        client(url, model, attempt_timeout=0.3, timeout=5.0, max_attempts=2, **options) as llm,
    ):
        with pytest.raises(APITimeoutError, match="Expected the next piece of its answer from .* within 0.3 s"):
            [delta async for delta in llm.stream(QUESTION)]
    assert requests == 2


async def test_comments_between_deltas_are_no_reason_to_end_a_stream() -> None:
    """Each event of the answer starts the limit again."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD)
        for _ in range(4):
            for part in (b": keep-alive\n\n", b": keep-alive\n\n", DELTA):
                writer.write(chunk(part))
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.write(chunk(LAST) + b"0\r\n\r\n")
        await writer.drain()

    async with serving(handle) as url, client(url, attempt_timeout=0.9, max_attempts=1) as llm:
        assert len([delta async for delta in llm.stream(QUESTION)]) == 4


async def test_a_slow_reader_is_no_reason_to_end_a_stream() -> None:
    """What the caller does between two deltas does not count as waiting for the server."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(DELTA + DELTA))
        await writer.drain()
        await asyncio.sleep(0.8)
        writer.write(chunk(b": keep-alive\n\n"))
        await writer.drain()
        await asyncio.sleep(0.4)
        writer.write(chunk(LAST) + b"0\r\n\r\n")
        await writer.drain()

    async with serving(handle) as url, client(url, attempt_timeout=1.0, max_attempts=1) as llm:
        count = 0
        async for _ in llm.stream(QUESTION):
            count += 1
            await asyncio.sleep(0.6)
    assert count == 2


def event(text: bytes) -> bytes:
    return b'data: {"choices": [{"index": 0, "delta": {"content": "' + text + b'"}}]}\n\n'


SMILE = "\N{GRINNING FACE}".encode()


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((rb"a\ud83d", rb"\ude00b"), "a\N{GRINNING FACE}b"),
        ((rb"\uD83D", rb"\uDE00", rb"\ud83d", rb"\ude00"), "\N{GRINNING FACE}" * 2),
        ((rb"\ud83d\ude00", b"k"), "\N{GRINNING FACE}k"),
        ((rb"path C:\\ud83d", b"x"), r"path C:\ud83dx"),
        ((SMILE[:2], SMILE[2:] + b"z"), "\N{GRINNING FACE}z"),
        ((SMILE[:1], SMILE[1:3], SMILE[3:]), "\N{GRINNING FACE}"),
        (("é".encode()[:1], "é".encode()[1:]), "é"),
        (("日本".encode()[:4], "日本".encode()[4:]), "日本"),
    ],
)
async def test_a_character_split_over_two_deltas_became_two_replacements(pieces: tuple[bytes, ...], text: str) -> None:
    """Servers that cut by tokens send the halves of a surrogate pair, or of its UTF-8 bytes, in separate events."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"".join(chunk(event(piece)) for piece in pieces) + chunk(LAST) + b"0\r\n\r\n")
        await writer.drain()

    async with serving(handle) as url, client(url) as llm:
        stream = llm.stream(QUESTION)
        assert "".join([delta async for delta in stream]) == stream.completion.text == text


STREAMED = HTTPReply(status=200, body=DELTA + LAST, headers={})
CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("x-gzip", gzip.compress),
    ("X-GZip", gzip.compress),
    ("x-deflate", zlib.compress),
    ("gzip, gzip", lambda body: gzip.compress(gzip.compress(body))),
    ("deflate, gzip", lambda body: gzip.compress(zlib.compress(body))),
    ("identity, gzip", gzip.compress),
]


def packed(coding: str, pack: Callable[[bytes], bytes], reply: HTTPReply) -> bytes:
    body = pack(reply.body)
    kind = b"text/event-stream" if reply.body.startswith(b"data:") else b"application/json"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-encoding: %s\r\ncontent-length: %d\r\n\r\n"
    return head % (kind, coding.encode(), len(body)) + body


@pytest.mark.parametrize(("coding", "pack"), CODINGS)
async def test_an_old_name_of_gzip_was_not_decoded(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """`x-gzip` and several codings in one header are passed on by aiohttp as they came."""
    replies = [packed(coding, pack, answer("a text")), packed(coding, pack, STREAMED)]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader) is not None:
            writer.write(replies.pop(0))
            await writer.drain()

    async with serving(handle) as url, client(url) as llm:
        assert (await llm.complete(QUESTION)).text == "a text"
        assert [delta async for delta in llm.stream(QUESTION)] == ["hello"]


async def test_a_body_that_is_not_in_its_uncommon_coding() -> None:
    """As for the usual codings: an answer that cannot be read."""
    reply = packed("x-gzip", lambda body: body, answer("a text"))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader) is not None:
            writer.write(reply)
            await writer.drain()

    async with serving(handle) as url, client(url, max_attempts=1) as llm:
        with pytest.raises(APIConnectionError, match="not in the coding that it states"):
            await llm.complete(QUESTION)
