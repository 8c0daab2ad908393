"""Streamed answers: deltas as they arrive, then the same usage and errors as whole answers."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, failure, read_request, serving

from aggregator import LLM, Budget, cassette
from aggregator.agents.transcripts import transcript
from aggregator.cassettes.tape import StreamLeftError
from aggregator.errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    ConfigError,
    LLMError,
    RateLimitError,
)
from aggregator.llm.ledger import collecting
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else msgspec.json.encode(data)) + b"\n\n"


def chunk(text: str | None = None, finish_reason: str | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    return event({"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})
WHOLE = [chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"), USAGE, event(b"[DONE]")]


class Streaming(Transport):
    """A transport that streams its pieces; an exception among them is raised at its position."""

    def __init__(self, *scripts: Any) -> None:
        self.scripts = list(scripts)
        self.opened = 0
        self.left = 0

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        raise AssertionError("a stream is opened, not sent")

    @asynccontextmanager
    async def open(self, request: HTTPRequest, *, timeout: float | None = None) -> AsyncIterator[Any]:
        script = self.scripts[min(self.opened, len(self.scripts) - 1)]
        self.opened += 1
        if isinstance(script, LLMError):
            raise script
        try:
            yield _Opened(script)
        finally:
            self.left += 1


class _Opened:
    def __init__(self, script: HTTPReply | list[Any]) -> None:
        whole = isinstance(script, HTTPReply)
        self.status = script.status if isinstance(script, HTTPReply) else 200
        self.headers = {"content-type": "application/json" if whole else "text/event-stream"}
        self.reason = ""
        self._script = [script.body] if isinstance(script, HTTPReply) else script

    async def pieces(self) -> AsyncIterator[bytes]:
        for piece in self._script:
            await asyncio.sleep(0)
            if isinstance(piece, LLMError):
                raise piece
            yield piece


def client(transport: Any, **options: Any) -> LLM:
    time = VirtualTime()
    return LLM("m", base_url=BASE_URL, transport=transport, clock=time.clock, sleep=time.sleep, **options)


async def read(llm: LLM) -> list[str]:
    return [delta async for delta in llm.stream(QUESTION)]


@pytest.mark.requirement("built 3: streams")
async def test_deltas_then_the_whole_answer() -> None:
    """Iterating yields the text in pieces; `completion` has all that `complete` returns."""
    stream = client(Streaming(WHOLE)).stream(QUESTION)
    with pytest.raises(ConfigError, match="read to its end"):
        _ = stream.completion
    assert [delta async for delta in stream] == ["Hel", "lo"]
    completion = stream.completion
    assert (completion.text, completion.finish_reason, completion.usage.output_tokens) == ("Hello", "stop", 2)


async def test_the_text_of_a_server_that_does_not_stream_was_no_delta(tmp_path: Path) -> None:
    """It is one delta, live and on replay, so that a program that shows deltas shows it."""
    path = tmp_path / "a.yaml"
    with cassette(path, "all"):
        live = await read(client(Streaming(answer("all at once"))))
    with cassette(path, "none"):
        replayed = await read(client(Streaming()))
    assert (live, replayed) == (["all at once"], ["all at once"])


async def test_a_failure_before_the_first_delta_is_retried() -> None:
    """Until the first delta a stream fails and recovers like any call."""
    transport = Streaming(APIConnectionError("cut"), failure(500), WHOLE)
    stream = client(transport).stream(QUESTION)
    assert "".join([delta async for delta in stream]) == "Hello"
    assert (stream.completion.attempts, transport.opened) == (3, 3)


async def test_a_failure_after_the_first_delta_is_raised() -> None:
    """A delta that was yielded cannot be taken back."""
    transport = Streaming([chunk("Hel"), APIConnectionError("cut")])
    stream = aiter(client(transport).stream(QUESTION))
    found = await anext(stream)
    with pytest.raises(APIConnectionError):
        await anext(stream)
    assert (found, transport.opened) == ("Hel", 1)


@pytest.mark.requirement("built 3: streams")
async def test_errors_inside_the_stream_are_errors() -> None:
    """An error event raises the error that it names; it is not text."""
    inside = event({"error": {"message": "slow down", "code": 429}})
    with pytest.raises(RateLimitError, match="slow down"):
        await read(client(Streaming([chunk("Hel"), inside])))


async def test_permanent_errors_are_tried_once() -> None:
    """As with `complete`, they are not retried."""
    transport = Streaming(failure(401, "key"))
    with pytest.raises(AuthenticationError):
        await read(client(transport))
    assert transport.opened == 1


async def test_a_truncated_stream_is_an_error() -> None:
    """The connection was closed properly, but the answer is not complete."""
    with pytest.raises(LLMError):
        await read(client(Streaming([chunk("Hel")])))


async def test_leaving_early_frees_everything() -> None:
    """A consumer that stops early ends the request, frees its place and settles the budget."""
    transport, budget = Streaming(WHOLE), Budget(calls=5)
    llm = client(transport, max_concurrency=1, budget=budget)
    for _ in range(2):
        async with llm.stream(QUESTION) as stream:
            async for _delta in stream:
                break
    assert (transport.left, budget.spent.calls, budget.reserved.calls) == (2, 2, 0)


async def test_a_transport_that_cannot_stream() -> None:
    """A plain transport's whole answer is one piece."""
    body = b"".join(WHOLE)
    whole = HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})
    assert await read(client(ScriptedTransport(whole))) == ["Hel", "lo"]


async def test_transcript_and_ledger() -> None:
    """A streamed call is in the transcript and the ledger like any other."""
    with transcript() as shown, collecting() as ledger:
        await read(client(Streaming(WHOLE)))
    assert "Hello" in shown.render()
    assert ledger.totals()["agent"].output_tokens == 2


async def test_replay_gives_the_same_deltas(tmp_path: Path) -> None:
    """A replay without network yields the same pieces, usage and errors."""
    recorded, played = [], []
    with cassette(tmp_path / "stream.yaml", "once"):
        recorded.append(await read(client(Streaming(WHOLE))))
        recorded.append(await read(client(Streaming([*WHOLE[:1], chunk("p!"), *WHOLE[2:]]))))
    offline = Streaming(APIConnectionError("no network in a replay"))
    with cassette(tmp_path / "stream.yaml", "none"):
        played.append(await read(client(offline)))
        played.append(await read(client(offline)))
    assert played == recorded == [["Hel", "lo"], ["Hel", "p!"]]
    assert offline.opened == 0


@pytest.mark.parametrize("error", [APITimeoutError("late"), APIConnectionError("cut in the middle")])
async def test_a_stream_that_stalled_was_replayed_as_one_without_an_end(tmp_path: Path, error: LLMError) -> None:
    """A replay yields the same pieces, then raises the failure that ended it: class, message, attempts."""

    async def outcome(transport: Streaming) -> tuple[list[str], object]:
        deltas: list[str] = []
        try:
            async for delta in client(transport).stream(QUESTION):
                deltas.append(delta)  # noqa: PERF401 - what came before the failure counts
        except LLMError as caught:
            return deltas, (type(caught), caught.message, caught.attempts)
        return deltas, None

    with cassette(tmp_path / "stalled.yaml", "all"):
        recorded = await outcome(Streaming([WHOLE[0], error]))
    with cassette(tmp_path / "stalled.yaml", "none"):
        played = await outcome(Streaming())
    assert recorded == played == (["Hel"], (type(error), error.message, 1))


async def test_a_stream_cut_before_its_first_delta_is_replayed_with_its_retry(tmp_path: Path) -> None:
    """The failure ends its own attempt only."""
    role = event({"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant"}}]})
    with cassette(tmp_path / "again.yaml", "all"):
        recorded = await read(client(Streaming([role, APIConnectionError("cut")], WHOLE)))
    with cassette(tmp_path / "again.yaml", "none"):
        assert await read(client(Streaming())) == recorded == ["Hel", "lo"]


async def test_replay_of_a_stream_that_was_left_early(tmp_path: Path) -> None:
    """The tape holds the pieces up to that point, so the same reader stops at the same place."""

    async def first(llm: LLM) -> str:
        async with llm.stream(QUESTION) as stream:
            return await anext(aiter(stream))

    with cassette(tmp_path / "left.yaml", "once"):
        recorded = await first(client(Streaming(WHOLE)))
    with cassette(tmp_path / "left.yaml", "none"):
        assert await first(client(Streaming(APIConnectionError("no network")))) == recorded == "Hel"


async def test_reading_on_after_an_abandoned_stream_raises(tmp_path: Path) -> None:
    """A replay does not present a part as the whole; a continued recording asks again."""

    async def first(llm: LLM) -> str:
        async with llm.stream(QUESTION) as stream:
            return await anext(aiter(stream))

    with cassette(tmp_path / "left.yaml", "once"):
        await first(client(Streaming(WHOLE)))
    with cassette(tmp_path / "left.yaml", "none"), pytest.raises(StreamLeftError, match="read so far and no further"):
        await read(client(Streaming()))
    with cassette(tmp_path / "left.yaml", "new_episodes"):
        assert await read(client(Streaming(WHOLE))) == ["Hel", "lo"]
    with cassette(tmp_path / "left.yaml", "none") as tape:
        assert await read(client(Streaming())) == ["Hel", "lo"]
    assert tape.report == []


async def test_a_cancelled_stream_was_recorded_as_a_whole_answer(tmp_path: Path) -> None:
    """It has no answer, like any cancelled call: a continued recording asks again, a replay misses."""
    path, stuck = tmp_path / "cancelled.yaml", asyncio.Event()

    class Stuck(Streaming):
        @asynccontextmanager
        async def open(self, request: HTTPRequest, *, timeout: float | None = None) -> AsyncIterator[Any]:
            async with super().open(request, timeout=timeout) as opened:
                pieces = opened.pieces

                async def then_nothing() -> AsyncIterator[bytes]:
                    async for piece in pieces():
                        yield piece
                        await stuck.wait()

                opened.pieces = then_nothing
                yield opened

    with cassette(path, "all") as tape, pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await read(client(Stuck(WHOLE)))
    assert tape.recorded == 0
    with cassette(path, "once"):
        assert await read(client(Streaming(WHOLE))) == ["Hel", "lo"]


async def test_a_stream_left_by_break_held_its_place_until_a_collection() -> None:
    """Only the reader holds a stream: leaving it by `break` ends its request and frees its place."""
    transport = Streaming(WHOLE)
    llm = client(transport, max_concurrency=2)
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            async for _delta in llm.stream(QUESTION):
                break
            await asyncio.sleep(0.001)
    finally:
        gc.enable()
    assert transport.left == 5


async def test_over_a_real_socket() -> None:
    """Server-sent events over aiohttp."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in WHOLE:
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async with serving(handle) as url:
        stream = LLM("m", base_url=url).stream(QUESTION)
        assert "".join([delta async for delta in stream]) == "Hello"
    assert stream.completion.usage.input_tokens == 9
