"""Streamed answers: the same tape, budget, limiter, errors and retries as whole ones, until the first delta."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, nullcontext
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from msgspec import field

from aggregator.agents.transcripts import current_transcript
from aggregator.cassettes.lineage import current_role, passing
from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError, LLMError
from aggregator.llm.attempts import Attempt, Attempts
from aggregator.llm.calls import ChatCall, StreamReader
from aggregator.records import Completion, HTTPReply

T = TypeVar("T")


class Stream:
    """One streamed answer: iterate over it for the text deltas; `completion` is the whole answer afterwards.

    Leaving it early (`break`) ends the request, at once with `async with`, otherwise when the object is
    garbage-collected.
    """

    def __init__(self, call: ChatCall, deltas: Callable[[ChatCall], AsyncGenerator[str | Completion, None]]) -> None:
        self._whole: list[Completion] = []
        self._deltas = _show(call, deltas, self._whole)

    def __repr__(self) -> str:
        return f"<Stream {'read to its end' if self._whole else 'not read to its end'}>"

    @property
    def completion(self) -> Completion:
        """The whole answer with usage and finish reason; raises ConfigError before the last delta was read."""
        if not self._whole:
            raise ConfigError("Expected a stream read to its end, got one that still has deltas to read")
        return self._whole[0]

    def __aiter__(self) -> AsyncIterator[str]:
        return self._deltas

    async def aclose(self) -> None:
        """End the request without reading on; leaving `async with` does the same."""
        await self._deltas.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def _show(
    call: ChatCall, deltas: Callable[[ChatCall], AsyncGenerator[str | Completion, None]], whole: list[Completion]
) -> AsyncGenerator[str, None]:
    """Yield the text and show the call; the answer is stored in `whole`: in the stream it would make a cycle."""
    transcript = current_transcript()
    shown = transcript.llm_call(call.messages) if transcript is not None and current_role() == "agent" else None
    try:
        async with aclosing(deltas(call)) as pieces:
            async for piece in pieces:
                if isinstance(piece, str):
                    yield piece
                else:
                    whole.append(piece)
    except BaseException as error:
        if shown is not None:
            shown.fail(error)
        raise
    if shown is not None:
        shown.finish(whole[0])


class StreamedAttempts(Attempts):
    """The attempts of a call whose answer is read as it arrives."""

    async def deltas(self) -> AsyncGenerator[str | Completion, None]:
        """Yield the text as it arrives, the whole answer last; retry as long as nothing was yielded."""
        while True:
            self.count += 1
            attempt, begun = StreamedAttempt(self, self.line, self.tape), False
            try:
                async with attempt, aclosing(attempt.deltas()) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
            except LLMError as error:
                error.attempts = self.count
                if begun or (wait := self.wait_after(attempt, error)) is None:
                    raise
            else:
                assert attempt.completion is not None
                yield attempt.completion
                return
            if wait:
                await self.line.sleep(wait)


class StreamedAttempt(Attempt, eq=False):
    """One request whose answer is read piece by piece."""

    body: list[bytes] = field(default_factory=list)
    chunks: list[tuple[int, float]] = field(default_factory=list)
    head: dict[str, Any] | None = None
    sent_at: float = 0.0
    waited: float = 0.0  # seconds since the last event that is part of the answer, without those of the reader

    async def __aenter__(self) -> Self:
        """Reserve the most that this attempt can cost."""
        if self.attempts.budgets and not self.take():
            await self.reserve()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Count the cost and record the answer."""
        await self.end(error)

    async def deltas(self) -> AsyncGenerator[str, None]:
        """Yield the text as it arrives; raises LLMError for an answer that is truncated, broken or an error.

        The text of a server that does not stream is one delta.
        """
        codec, begun = self.line.endpoint.codec, False
        reader = codec.stream(self.attempts.call)
        cut: APIConnectionError | None = None
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    if self.reply is not None and self.reply.status < 300:
                        for delta in filter(None, self._fed(reader, piece)):
                            begun = True
                            yield delta
        except APIConnectionError as error:
            if not self.body:
                raise
            cut = error
        reply = self.reply if cut is None else self._so_far()
        assert reply is not None
        if reply.status >= 300:
            raise codec.error(reply)
        try:
            completion = reader.finish(reply)
        except LLMError as error:
            raise cut or error from None
        self.complete(completion)  # the answer was complete, even if the connection broke after its end
        if completion.text and not begun:
            yield completion.text

    def _fed(self, reader: StreamReader, piece: bytes) -> list[str]:
        """Return the deltas that a piece completes; a comment or ping does not restart the limit of waiting."""
        before = getattr(reader, "heard", None)
        deltas = reader.feed(piece)
        if before is None or getattr(reader, "heard", None) != before:
            self.waited = 0.0
        return deltas

    def _pieces(self) -> AsyncGenerator[bytes, None]:
        tape, slot = self.tape, self.attempts.slot
        if (reply := self.play()) is not None:
            assert tape is not None
            assert slot is not None
            failure, slot.failure = slot.failure, None
            return _paced(reply, tape.delay(reply), self.line.sleep, failure)
        return self._live()

    async def _live(self) -> AsyncGenerator[bytes, None]:
        """Yield the pieces as they arrive over the network."""
        if not self.try_admit():
            await self.admit()
        self.sent_at = perf_counter()
        async with AsyncExitStack() as stack:
            with passing() if self.is_watched() else nullcontext():
                opening = self.line.transport.open(self.attempts.request, timeout=self.attempts.timeout())
                opened = await self._in_time(stack.enter_async_context(opening), "the head of its answer")
            self.head = {"status": opened.status, "headers": opened.headers, "reason": opened.reason}
            self.reply = self._so_far()
            pieces = aiter(opened.pieces())
            while (piece := await self._in_time(anext(pieces, None), "the next piece of its answer")) is not None:
                self.body.append(piece)
                self.chunks.append((len(piece), round((perf_counter() - self.sent_at) * 1e3, 3)))
                yield piece
        self.reply = self._so_far()
        self.accept(opened.status, opened.headers)

    async def _in_time(self, waiting: Awaitable[T], what: str) -> T:
        """Return the awaited value; raises APITimeoutError if an attempt's timeout passes without an event."""
        limit, begun = self.timeout(), perf_counter()
        try:
            async with asyncio.timeout(self.timeout(self.waited)):
                value = await waiting
        except TimeoutError:
            host = urlsplit(self.attempts.request.url).hostname
            raise APITimeoutError(f"Expected {what} from {host} within {limit or 0:.3g} s, got nothing") from None
        self.waited += perf_counter() - begun
        return value

    def _so_far(self) -> HTTPReply:
        return HTTPReply(
            body=b"".join(self.body),
            chunks=tuple(self.chunks),
            milliseconds=(perf_counter() - self.sent_at) * 1e3,
            **(self.head or {}),
        )

    def recorded(self, error: BaseException | None) -> tuple[HTTPReply | None, APIConnectionError | None]:
        """Return what a recording keeps.

        A cancelled answer is not kept; an abandoned one ends at the same place in a replay.
        """
        from aggregator.cassettes.tape import StreamLeftError  # loaded with the tape

        if isinstance(error, GeneratorExit) and self.body:
            error = StreamLeftError("this answer was read so far and no further when it was recorded")
        elif not isinstance(error, LLMError | None):
            return None, None
        if self.head is not None:
            lost = isinstance(error, APIConnectionError) and not self.body
            self.reply = None if lost else self._so_far()
        return super().recorded(error)


async def _paced(
    reply: HTTPReply, delay: float, sleep: Callable[[float], Awaitable[None]], failure: APIConnectionError | None
) -> AsyncGenerator[bytes, None]:
    """Yield the recorded pieces at the recorded pace, stretched to `delay` seconds, at least one loop iteration each.

    `failure` is what ended them.
    """
    scale = delay / reply.milliseconds if reply.milliseconds else 0.0
    position, before = 0, 0.0
    for length, milliseconds in reply.chunks or ((len(reply.body), reply.milliseconds),):
        pause = scale * max(0.0, milliseconds - before)
        await (sleep(pause) if pause else asyncio.sleep(0))
        before = milliseconds
        yield reply.body[position : position + length]
        position += length
    if position < len(reply.body):
        yield reply.body[position:]
    if failure is not None:
        raise failure
