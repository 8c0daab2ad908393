"""httpx and httpx2, and the SDKs that use them: one request of a transport that reaches the network.

In-process transports (`ASGITransport`, `WSGITransport`, `MockTransport`, custom ones) run the code under test, and are
not intercepted, except for vcrpy's tests.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import cache, partial, wraps
from typing import Any

from aggregator.cassettes.clients import headers_of, kind_of, standard_error, to_request
from aggregator.cassettes.lineage import passing
from aggregator.cassettes.tape import RecordedError
from aggregator.cassettes.traffic import Tee, Turn, begin, is_wanted, leaves_out, refuse
from aggregator.patching import Patch
from aggregator.records import HTTPReply

CLIENT = "httpx"


def _begin(module: Any, request: Any, body: bytes) -> Turn | None:
    """Begin the request's turn; None for a websocket handshake, which a cassette cannot hold."""
    url = str(request.url)
    if request.headers.get("upgrade", "").lower() == "websocket":
        if (refusal := refuse("websockets", request.method, url)) is not None:
            raise refusal
        return None
    request.stream = module.ByteStream(body)  # read already, to be read again
    return begin(CLIENT, to_request(request.method, url, body, request.headers))


def played(module: Any, reply: HTTPReply, method: str) -> Any:
    """Return a recorded answer as httpx's."""
    return module.Response(
        reply.status,
        headers=headers_of(reply, method),
        stream=module.ByteStream(reply.body),
        extensions={"http_version": b"HTTP/1.1"}
        | ({"reason_phrase": reply.reason.encode("ascii", "replace")} if reply.reason else {}),
    )


def raised(module: Any, failure: RecordedError, request: Any) -> Exception:
    """Return a recorded failure as httpx's exception."""
    home, _, name = failure.kind.rpartition(".")
    kind = getattr(module, name, None) if home in ("httpx", "httpx2") else None
    if not (isinstance(kind, type) and issubclass(kind, module.TransportError)):
        plain = standard_error(failure.kind, failure.message)
        kind = module.ReadTimeout if isinstance(plain, TimeoutError) else module.ConnectError
    error: Exception = kind(failure.message, request=request)
    return error


def _received(turn: Turn, response: Any, content: bytes) -> HTTPReply:
    return turn.answer(response.status_code, response.reason_phrase, response.headers.multi_items(), content)


def read(stream: Any) -> bytes:
    """Read a stream to its end and close it."""
    try:
        content = b"".join(stream)
    except BaseException:
        with suppress(Exception):
            stream.close()
        raise
    stream.close()
    return content


async def aread(stream: Any) -> bytes:
    """Read an asynchronous stream to its end and close it."""
    try:
        content = b"".join([part async for part in stream])
    except BaseException:
        with suppress(Exception):
            await stream.aclose()
        raise
    await stream.aclose()
    return content


def tee_of(turn: Turn, response: Any) -> Tee | None:
    """Return the collector of a streamed answer that is shown while it is read; None if it must be read first."""
    return turn.tee(response.status_code, response.reason_phrase, response.headers.multi_items())


@cache
def teed(module: Any) -> Any:
    """Return the class of a stream that is shown while its client reads it."""

    class Teed(module.SyncByteStream, module.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any, tee: Tee) -> None:
            self._stream, self._tee = stream, tee

        def __iter__(self) -> Iterator[bytes]:
            try:
                for piece in self._stream:
                    yield self._tee.take(piece)
            except module.TransportError as error:
                self._tee.fail(kind_of(error, module.__name__), str(error))
                raise
            self._tee.end()

        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                async for piece in self._stream:
                    yield self._tee.take(piece)
            except module.TransportError as error:
                self._tee.fail(kind_of(error, module.__name__), str(error))
                raise
            self._tee.end()

        def close(self) -> None:
            self._tee.end()
            self._stream.close()

        async def aclose(self) -> None:
            self._tee.end()
            await self._stream.aclose()

    return Teed


def module_of(request: Any) -> Any:
    """Return httpx or httpx2, depending on the request."""
    return sys.modules[type(request).__module__.partition(".")[0]]


def _handle_request(original: Callable[..., Any], *, in_process: bool = False) -> Callable[..., Any]:
    @wraps(original)
    def handle_request(self: Any, request: Any) -> Any:
        if not is_wanted(CLIENT, in_process=in_process):
            return original(self, request)
        if leaves_out(CLIENT, request.url):
            with passing():
                return original(self, request)
        module = module_of(request)
        turn = _begin(module, request, b"".join(request.stream))
        if turn is None:
            with passing():
                return original(self, request)
        if turn.failure is not None:
            raise raised(module, turn.failure, request)
        if turn.reply is not None:
            turn.wait()
            return played(module, turn.reply, request.method)
        with turn.sending(module.TransportError, module=module.__name__):
            response = original(self, request)
            if (tee := tee_of(turn, response)) is not None:
                response.stream = teed(module)(response.stream, tee)
                return response
            content = read(response.stream)
        turn.finish(_received(turn, response, content))
        response.stream = module.ByteStream(content)
        return response

    return handle_request


def _handle_async_request(original: Callable[..., Any], *, in_process: bool = False) -> Callable[..., Any]:
    @wraps(original)
    async def handle_async_request(self: Any, request: Any) -> Any:
        if not is_wanted(CLIENT, in_process=in_process):
            return await original(self, request)
        if leaves_out(CLIENT, request.url):
            with passing():
                return await original(self, request)
        module = module_of(request)
        turn = _begin(module, request, b"".join([part async for part in request.stream]))
        if turn is None:
            with passing():
                return await original(self, request)
        if turn.failure is not None:
            await turn.await_turn()
            raise raised(module, turn.failure, request)
        if turn.reply is not None:
            await turn.await_turn()
            return played(module, turn.reply, request.method)
        with turn.sending(module.TransportError, module=module.__name__):
            response = await original(self, request)
            if (tee := tee_of(turn, response)) is not None:
                response.stream = teed(module)(response.stream, tee)
                return response
            content = await aread(response.stream)
        await turn.afinish(_received(turn, response, content))
        response.stream = module.ByteStream(content)
        return response

    return handle_async_request


_IN_PROCESS = tuple(
    Patch(module, path, partial(guard, in_process=True))
    for module in ("httpx", "httpx2")
    for path, guard in (
        ("WSGITransport.handle_request", _handle_request),
        ("MockTransport.handle_request", _handle_request),
        ("ASGITransport.handle_async_request", _handle_async_request),
        ("MockTransport.handle_async_request", _handle_async_request),
    )
)
PATCHES = (
    *_IN_PROCESS,
    Patch("httpx", "HTTPTransport.handle_request", _handle_request),
    Patch("httpx", "AsyncHTTPTransport.handle_async_request", _handle_async_request),
    Patch("httpx2", "HTTPTransport.handle_request", _handle_request),
    Patch("httpx2", "AsyncHTTPTransport.handle_async_request", _handle_async_request),
    Patch("httpx_curl_cffi", "CurlTransport.handle_request", _handle_request),
    Patch("httpx_curl_cffi", "AsyncCurlTransport.handle_async_request", _handle_async_request),
    Patch("pyreqwest.compatibility.httpx", "SyncHttpxTransport.handle_request", _handle_request),
    Patch("pyreqwest.compatibility.httpx", "HttpxTransport.handle_async_request", _handle_async_request),
)
