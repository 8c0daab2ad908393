"""lm15, the client bundled with DSPy from version 3.4 on: one request of its transports for threads and asyncio.

Both have one method that opens a streamed answer. A played answer, and one that was read to be recorded, becomes a
response of the same class, from memory.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import wraps
from typing import Any

from aggregator.cassettes.clients import headers_of, kind_of, standard_error, to_request
from aggregator.cassettes.lineage import passing
from aggregator.cassettes.tape import RecordedError
from aggregator.cassettes.traffic import Tee, Turn, begin, is_wanted, leaves_out
from aggregator.patching import Patch

CLIENT = "lm15"


def _module_of(request: Any) -> Any:
    """Return the module `transports`, of DSPy's copy or of the package."""
    return sys.modules[type(request).__module__.rpartition(".")[0]]


def _begin(request: Any) -> Turn:
    return begin(CLIENT, to_request(request.method, request.url, request.body or b"", dict(request.headers)))


def _raised(module: Any, failure: RecordedError) -> Exception:
    """Return a recorded failure as lm15's exception."""
    kind = getattr(module, failure.kind.rpartition(".")[2], None)
    if not (isinstance(kind, type) and issubclass(kind, module.TransportError)):
        plain = standard_error(failure.kind, failure.message)
        kind = module.ReadTimeout if isinstance(plain, TimeoutError) else module.ConnectError
    error: Exception = kind(failure.message)
    return error


def _home(module: Any) -> str:
    """Return the package in which the errors of lm15's module are public."""
    return str(module.__name__).rpartition(".")[0]


def _head(response: Any) -> tuple[int, str, list[tuple[str, str]]]:
    return response.status, response.reason, response.headers


def _stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def stream(self: Any, request: Any) -> Any:
        if not is_wanted(CLIENT):
            return original(self, request)
        if leaves_out(CLIENT, request.url):
            with passing():
                return original(self, request)
        module, turn = _module_of(request), _begin(request)
        if turn.failure is not None:
            raise _raised(module, turn.failure)
        if turn.reply is not None:
            turn.wait()
            reply = turn.reply
            return _made(module, reply.status, reply.reason, headers_of(reply, request.method), reply.body)
        with turn.sending(module.TransportError, module=_home(module)):
            response = original(self, request)
            if (tee := turn.tee(*_head(response))) is not None:
                response._chunks = _teed(response._chunks, tee, module)  # noqa: SLF001 - it has no other face
                return response
            with response:
                content = response.read()
        turn.finish(turn.answer(*_head(response), content))
        return _made(module, *_head(response), content)

    return stream


def _made(module: Any, status: int, reason: str, headers: list[tuple[str, str]], body: bytes) -> Any:
    return module.TransportResponse(
        status=status,
        reason=reason,
        headers=headers,
        http_version="HTTP/1.1",
        chunks=iter([body]),
        release=lambda _: None,
    )


def _teed(chunks: Iterator[bytes], tee: Tee, module: Any) -> Iterator[bytes]:
    """Yield the pieces of a streamed answer, and show it at its end or when it is left."""
    try:
        for piece in chunks:
            yield tee.take(piece)
    except module.TransportError as error:
        tee.fail(kind_of(error, _home(module)), str(error))
        raise
    finally:
        tee.end()


def _do_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def do_stream(self: Any, request: Any) -> Any:
        if not is_wanted(CLIENT):
            return await original(self, request)
        if leaves_out(CLIENT, request.url):
            with passing():
                return await original(self, request)
        module, turn = _module_of(request), _begin(request)
        if turn.failure is not None:
            await turn.await_turn()
            raise _raised(module, turn.failure)
        if turn.reply is not None:
            await turn.await_turn()
            reply = turn.reply
            return _amade(module, reply.status, reply.reason, headers_of(reply, request.method), reply.body)
        with turn.sending(module.TransportError, module=_home(module)):
            response = await original(self, request)
            if (tee := turn.tee(*_head(response))) is not None:
                response._chunks = _ateed(response._chunks, tee, module)  # noqa: SLF001 - as above
                return response
            async with response:
                content = await response.read()
        await turn.afinish(turn.answer(*_head(response), content))
        return _amade(module, *_head(response), content)

    return do_stream


def _amade(module: Any, status: int, reason: str, headers: list[tuple[str, str]], body: bytes) -> Any:
    async def chunks() -> AsyncIterator[bytes]:
        yield body

    async def release(_: bool) -> None:
        return None

    return module.AsyncTransportResponse(
        status=status, reason=reason, headers=headers, http_version="HTTP/1.1", chunks=chunks(), release=release
    )


async def _ateed(chunks: AsyncIterator[bytes], tee: Tee, module: Any) -> AsyncIterator[bytes]:
    """Yield the pieces of a streamed answer, and show it at its end or when it is left."""
    try:
        async for piece in chunks:
            yield tee.take(piece)
    except module.TransportError as error:
        tee.fail(kind_of(error, _home(module)), str(error))
        raise
    finally:
        tee.end()


PATCHES = tuple(
    Patch(f"{home}.transports.{module}", path, guard)
    for home in ("dspy._vendor.lm15", "lm15")
    for module, path, guard in (
        ("_sync", "StdlibTransport.stream", _stream),
        ("_async", "StdlibAsyncTransport._do_stream", _do_stream),
    )
)
