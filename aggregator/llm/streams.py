"""Streamed answers: the same tape, budget, limiter, errors and retries as whole ones, until the first delta is out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from aggregator.agents.transcripts import current_transcript
from aggregator.cassettes.clients import passing
from aggregator.cassettes.lineage import current_role
from aggregator.cassettes.tape import Slot
from aggregator.errors import APIConnectionError, ConfigError, LLMError
from aggregator.llm.attempts import Attempt, Attempts
from aggregator.llm.calls import ChatCall
from aggregator.protocols import Transport
from aggregator.records import Completion, HTTPReply, HTTPRequest

Trace = Callable[[Attempts, Completion | None, BaseException | None], None]


class Stream:
    """One streamed answer: iterate it for the text deltas; `completion` is the whole answer once they ended."""

    def __init__(self, call: ChatCall, begin: Callable[[], Attempts], trace: Trace) -> None:
        self._deltas = self._run(call, begin, trace)
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The whole answer with usage and finish reason; raises ConfigError before the last delta was read."""
        if self._completion is None:
            raise ConfigError("expected a stream read to its end, got one that still has deltas to read")
        return self._completion

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

    async def _run(self, call: ChatCall, begin: Callable[[], Attempts], trace: Trace) -> AsyncGenerator[str, None]:
        attempts = begin()
        transcript = current_transcript()
        shown = transcript.llm_call(call.messages) if transcript is not None and current_role() == "agent" else None
        try:
            async with aclosing(_deltas(attempts, call)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, str):
                        yield piece
                    else:
                        self._completion = piece
        except BaseException as error:
            if shown is not None:
                shown.fail(error)
            trace(attempts, None, error)
            raise
        finally:
            attempts.leave()
        if shown is not None:
            shown.finish(self.completion)
        trace(attempts, self.completion, None)


async def _deltas(attempts: Attempts, call: ChatCall) -> AsyncGenerator[str | Completion, None]:
    """Yield the text as it comes, the whole answer last; try again as long as nothing was yielded."""
    request, slot = attempts.issue(call)
    while True:
        attempts.count += 1
        attempt = StreamedAttempt(attempts, call, request, slot)
        begun = False
        try:
            async with aclosing(attempt.stream()) as pieces:
                async for piece in pieces:
                    begun = True
                    yield piece
        except LLMError as error:
            wait = None if begun else attempts.wait_after(error, attempt)
            if wait is None:
                error.attempts = attempts.count
                raise
        else:
            return
        if wait:
            await attempts.line.sleep(wait)


class StreamedAttempt(Attempt):
    """One request whose answer is read as it comes."""

    __slots__ = ("_body", "_chunks", "_head")

    def __init__(self, attempts: Attempts, call: ChatCall, request: HTTPRequest, slot: Slot | None) -> None:
        super().__init__(attempts, call, request, slot)
        self._body: list[bytes] = []
        self._chunks: list[tuple[int, float]] = []
        self._head: dict[str, Any] | None = None

    async def stream(self) -> AsyncGenerator[str | Completion, None]:
        """Play or send, as `run` does."""
        reservation = await self.reserve()
        completion: Completion | None = None
        error: BaseException | None = None
        try:
            async with aclosing(self._read()) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Completion):
                        completion = piece
                    yield piece
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.settle(reservation, completion, error)

    async def _read(self) -> AsyncGenerator[str | Completion, None]:
        tape, slot = self.attempts.tape, self.slot
        if tape is not None and slot is not None and (reply := tape.play(slot)) is not None:
            self.reply, self.sent = reply, True
            async with aclosing(self._decoded(_paced(reply, tape.delay(reply)))) as pieces:
                async for piece in pieces:
                    yield piece
            return
        completion: Completion | None = None
        failure: APIConnectionError | None = None
        try:
            async with aclosing(self._decoded(self._live())) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Completion):
                        completion = piece  # written to the tape before it is used
                    else:
                        yield piece
        except APIConnectionError as error:
            failure = error
            raise
        finally:
            self._keep(completion, failure)
        if completion is not None:
            yield completion

    async def _decoded(self, source: AsyncGenerator[bytes, None]) -> AsyncGenerator[str | Completion, None]:
        codec = self.attempts.line.endpoint.codec
        reader = codec.stream(self.call)
        async with aclosing(source) as pieces:
            async for piece in pieces:
                if self.reply is not None and self.reply.status < 300:
                    for delta in reader.feed(piece):
                        if delta:
                            yield delta
        reply = self.reply
        assert reply is not None
        if reply.status >= 300:
            raise codec.error(reply)
        yield self.accounted(reader.finish(reply))

    async def _live(self) -> AsyncGenerator[bytes, None]:
        """The pieces as they come over the network."""
        limiter = await self.admit()
        started = perf_counter()
        async with _opened(self.attempts.line.transport, self.request, self.attempts.timeout()) as opened:
            self._head = {"status": opened.status, "headers": opened.headers, "reason": opened.reason}
            self.reply = self._so_far(started)
            async for piece in opened.pieces():
                self._body.append(piece)
                self._chunks.append((len(piece), round((perf_counter() - started) * 1e3, 3)))
                yield piece
        self.reply = self._so_far(started)
        if opened.status != 429 and self.admission is not None:
            limiter.accepted(self.admission, opened.headers)

    def _so_far(self, started: float) -> HTTPReply:
        return HTTPReply(
            body=b"".join(self._body),
            chunks=tuple(self._chunks),
            milliseconds=(perf_counter() - started) * 1e3,
            **(self._head or {}),
        )

    def _keep(self, completion: Completion | None, failure: APIConnectionError | None) -> None:
        """Write what came to the tape, also where it was cut short or not read to its end."""
        tape, slot = self.attempts.tape, self.slot
        if tape is None or slot is None:
            return
        if failure is not None and not self._body:
            tape.record_failure(slot, failure)
        elif self._head is not None:
            reply = HTTPReply(
                body=b"".join(self._body),
                chunks=tuple(self._chunks),
                milliseconds=self._chunks[-1][1] if self._chunks else 0.0,
                **self._head,
            )
            usage = None if completion is None else completion.usage
            tape.record(slot, reply, usage=usage, model=self.call.model)


async def _paced(reply: HTTPReply, delay: float) -> AsyncGenerator[bytes, None]:
    """The recorded pieces at the recorded pace, stretched to `delay` seconds; at least one turn of the loop each."""
    scale = delay / reply.milliseconds if reply.milliseconds else 0.0
    position, before = 0, 0.0
    for length, milliseconds in reply.chunks or ((len(reply.body), reply.milliseconds),):
        await asyncio.sleep(scale * max(0.0, milliseconds - before))
        before = milliseconds
        yield reply.body[position : position + length]
        position += length
    if position < len(reply.body):
        yield reply.body[position:]


@asynccontextmanager
async def _opened(transport: Transport, request: HTTPRequest, timeout: float | None) -> AsyncIterator[Any]:
    """An answer to read piece by piece; a transport that cannot stream gives it in one."""
    opener = getattr(transport, "open", None)
    async with AsyncExitStack() as stack:
        with passing():
            if opener is None:
                reply = _Whole(await transport.send(request, timeout=timeout))
            else:
                reply = await stack.enter_async_context(opener(request, timeout=timeout))
        yield reply


class _Whole:
    """A whole reply in the shape of a streamed one."""

    def __init__(self, reply: HTTPReply) -> None:
        self.status, self.headers, self.reason, self._body = reply.status, reply.headers, reply.reason, reply.body

    async def pieces(self) -> AsyncIterator[bytes]:
        if self._body:
            yield self._body
