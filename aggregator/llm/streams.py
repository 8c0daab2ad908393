"""Streamed answers: the same tape, budget, limiter, errors and retries as whole ones, until the first delta is out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from aggregator.agents.transcripts import current_transcript
from aggregator.cassettes.clients import passing
from aggregator.cassettes.lineage import current_role
from aggregator.cassettes.tape import StreamLeftError, Tape
from aggregator.errors import APIConnectionError, ConfigError, LLMError
from aggregator.llm.attempts import A_TURN, Attempts
from aggregator.llm.calls import ChatCall
from aggregator.protocols import Transport
from aggregator.records import Completion, HTTPReply, HTTPRequest

Trace = Callable[[Attempts, Completion | None, BaseException | None], None]


class Stream:
    """One streamed answer: iterate it for the text deltas; `completion` is the whole answer once they ended.

    Whoever leaves it early (`break`) ends the request, at once with `async with`, else when nobody holds it any more.
    """

    def __init__(self, call: ChatCall, deltas: Callable[[ChatCall], AsyncGenerator[str | Completion, None]]) -> None:
        self._whole: list[Completion] = []
        self._deltas = _run(call, deltas, self._whole)

    @property
    def completion(self) -> Completion:
        """The whole answer with usage and finish reason; raises ConfigError before the last delta was read."""
        if not self._whole:
            raise ConfigError("expected a stream read to its end, got one that still has deltas to read")
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


async def _run(
    call: ChatCall, deltas: Callable[[ChatCall], AsyncGenerator[str | Completion, None]], whole: list[Completion]
) -> AsyncGenerator[str, None]:
    """Yield the deltas; the answer goes into `whole`, and not to the stream, which would make a cycle."""
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


async def read_stream(
    attempts: StreamedAttempts, call: ChatCall, trace: Trace
) -> AsyncGenerator[str | Completion, None]:
    """Issue a call and yield its deltas, the whole answer last."""
    whole: Completion | None = None
    try:
        attempts.issue(call)
        async with aclosing(attempts.deltas()) as pieces:
            async for piece in pieces:
                whole = piece if isinstance(piece, Completion) else None
                yield piece
    except BaseException as error:
        trace(attempts, None, error)
        raise
    finally:
        attempts.leave()
    trace(attempts, whole, None)


class StreamedAttempts(Attempts):
    """The attempts of a call whose answer is read as it comes."""

    __slots__ = ("_body", "_chunks", "_head", "_sent_at")

    def begin(self) -> None:
        """Begin the next attempt, with nothing read yet."""
        super().begin()
        self._body: list[bytes] = []
        self._chunks: list[tuple[int, float]] = []
        self._head: dict[str, Any] | None = None

    async def deltas(self) -> AsyncGenerator[str | Completion, None]:
        """Yield the text as it comes, the whole answer last; try again as long as nothing was yielded."""
        while True:
            begun = False
            try:
                async with aclosing(self._stream()) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
            except LLMError as error:
                wait = None if begun else self.wait_after(error)
                if wait is None:
                    error.attempts = self.count
                    raise
            else:
                return
            if wait:
                await self.line.sleep(wait)

    async def _stream(self) -> AsyncGenerator[str | Completion, None]:
        """One attempt: play or send. Whatever happens, what came is recorded and the budget settled."""
        self.begin()
        await self.reserve()
        completion: Completion | None = None
        error: BaseException | None = None
        try:
            async with aclosing(self._read(self._source())) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Completion):
                        completion = piece
                    else:
                        yield piece
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.settle(completion, error)
            if self.is_live and self.tape is not None:
                self._keep(self.tape, completion, error)
            error = None  # its traceback holds this frame
        if completion is not None:
            yield completion

    def _keep(self, tape: Tape, completion: Completion | None, error: BaseException | None) -> None:
        """Record what came. What was cancelled has no answer; what was left early ends there in a replay too."""
        if isinstance(error, GeneratorExit) and self._body:
            error = StreamLeftError("this answer was read so far and no further when it was recorded")
        elif not isinstance(error, LLMError | None):
            return
        if self._head is not None:
            lost = isinstance(error, APIConnectionError) and not self._body
            self.reply = None if lost else self._so_far()
        if (entry := self._hand_in(tape, completion, error)) is not None:
            tape.finish(entry)

    def _source(self) -> AsyncGenerator[bytes, None]:
        tape = self.tape
        if tape is not None and self.slot is not None and (reply := self.play(tape)) is not None:
            failure, self.slot.failure = self.slot.failure, None
            return _paced(reply, tape.delay(reply), self.line.sleep, failure)
        return self._live()

    async def _read(self, source: AsyncGenerator[bytes, None]) -> AsyncGenerator[str | Completion, None]:
        codec = self.line.endpoint.codec
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
        yield self.line.priced(reader.finish(reply), self.count)

    async def _live(self) -> AsyncGenerator[bytes, None]:
        """The pieces as they come over the network."""
        if not self.try_admit():
            await self.admit()
        self._sent_at = perf_counter()
        async with _opened(self.line.transport, self.request, self.timeout()) as opened:
            self._head = {"status": opened.status, "headers": opened.headers, "reason": opened.reason}
            self.reply = self._so_far()
            async for piece in opened.pieces():
                self._body.append(piece)
                self._chunks.append((len(piece), round((perf_counter() - self._sent_at) * 1e3, 3)))
                yield piece
        self.reply = self._so_far()
        self.heard(opened.status, opened.headers)

    def _so_far(self) -> HTTPReply:
        return HTTPReply(
            body=b"".join(self._body),
            chunks=tuple(self._chunks),
            milliseconds=(perf_counter() - self._sent_at) * 1e3,
            **(self._head or {}),
        )


async def _paced(
    reply: HTTPReply, delay: float, sleep: Callable[[float], Awaitable[None]], failure: APIConnectionError | None
) -> AsyncGenerator[bytes, None]:
    """The recorded pieces at the recorded pace, stretched to `delay` seconds; at least one turn of the loop each.

    `failure` is what ended them.
    """
    scale = delay / reply.milliseconds if reply.milliseconds else 0.0
    position, before = 0, 0.0
    for length, milliseconds in reply.chunks or ((len(reply.body), reply.milliseconds),):
        pause = scale * max(0.0, milliseconds - before)
        await (sleep(pause) if pause else A_TURN)
        before = milliseconds
        yield reply.body[position : position + length]
        position += length
    if position < len(reply.body):
        yield reply.body[position:]
    if failure is not None:
        raise failure


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
