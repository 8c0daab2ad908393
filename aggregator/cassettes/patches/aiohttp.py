"""aiohttp: one hop of a session's request, at the connector: redirects, cookies and middlewares are aiohttp's own.

If the tape answers, the connector returns an unconnected connection that has the answer. Otherwise the answer is read
to its end and recorded before the session gets it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from aggregator.cassettes.clients import kind_of, raw_reply, standard_error, to_request
from aggregator.cassettes.lineage import passing
from aggregator.cassettes.tape import RecordedError
from aggregator.cassettes.traffic import Tee, begin, is_wanted, leaves_out, refuse
from aggregator.patching import Patch

CLIENT = "aiohttp"
_TURN = "_aggregator_turn"


class _Nowhere(asyncio.Transport):
    """A sink for what a request writes."""

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    abort = close

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@cache
def _connection_class() -> Any:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection

    class Played(Connection):
        """A connection that has its answer, and does not return to a pool."""

        def __init__(self, connector: Any, key: Any, raw: bytes) -> None:
            loop = asyncio.get_running_loop()
            protocol = ResponseHandler(loop)
            protocol.connection_made(_Nowhere())
            super().__init__(connector, key, protocol, loop)
            self.raw = raw

        def close(self) -> None:
            self._notify_release()
            self._protocol = None

        release = close

    return Played


class _Buffer:
    """Collects a payload's bytes, like the writer of a connection."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    async def write(self, data: Any, **_: Any) -> None:
        self.parts.append(bytes(data))

    async def write_eof(self, data: bytes = b"") -> None:
        self.parts.append(bytes(data))

    async def drain(self) -> None:
        pass

    def enable_compression(self, *_: Any, **__: Any) -> None:
        pass

    enable_chunking = enable_compression


async def _body_of(request: Any) -> bytes:
    """Return the bytes that the request will send; a body that can be read only once is replaced by them."""
    from aiohttp.payload import BytesPayload, Payload

    body = request.body
    if not isinstance(body, Payload):
        return bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b"".join(body or ())
    if isinstance(body, BytesPayload):
        return bytes(body._value)  # noqa: SLF001 - it has no other face in aiohttp 3.10
    buffer = _Buffer()
    await body.write(buffer)  # type: ignore[arg-type]
    data = b"".join(buffer.parts)
    plain = BytesPayload(data, headers=body.headers)
    if isinstance(getattr(type(request), "body", None), property):
        request._body = plain  # noqa: SLF001 - its setter warns
    else:
        request.body = plain
    return data


def _raised(failure: RecordedError, request: Any) -> BaseException:
    import aiohttp

    home, _, name = failure.kind.rpartition(".")
    kind = getattr(aiohttp, name, None) if home == "aiohttp" else None
    plain = standard_error(failure.kind, failure.message)
    if isinstance(kind, type) and issubclass(kind, aiohttp.ClientConnectorError):
        return kind(request.connection_key, OSError(*standard_error("builtins.OSError", failure.message).args))
    if isinstance(kind, type) and issubclass(kind, aiohttp.ClientResponseError):
        return kind(request.request_info, (), message=failure.message)
    if isinstance(kind, type) and issubclass(kind, OSError) and isinstance(plain, OSError):
        return kind(*standard_error("builtins.OSError", failure.message).args)
    if isinstance(kind, type) and issubclass(kind, aiohttp.ClientError):
        return kind(failure.message)
    if home == "builtins":
        return plain
    return (
        aiohttp.ServerTimeoutError(failure.message)
        if isinstance(plain, TimeoutError)
        else aiohttp.ClientConnectionError(failure.message)
    )


def _message(error: BaseException) -> str:
    return getattr(error, "message", None) or str(getattr(error, "os_error", None) or error)


def _failures() -> tuple[type[BaseException], ...]:
    import aiohttp

    return (aiohttp.ClientError, OSError, TimeoutError)


def _connect(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def connect(self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_wanted(CLIENT):
            return await original(self, req, *args, **kwargs)
        url = str(req.url)
        if leaves_out(CLIENT, url):
            with passing():
                return await original(self, req, *args, **kwargs)
        turn = begin(CLIENT, to_request(req.method, url, await _body_of(req), req.headers))
        if turn.failure is not None:
            await turn.await_turn()
            raise _raised(turn.failure, req)
        if turn.reply is not None:
            await turn.await_turn()
            return _connection_class()(self, req.connection_key, raw_reply(turn.reply, turn.request.method))
        with turn.sending(*_failures(), module=CLIENT, text=_message):
            connection = await original(self, req, *args, **kwargs)
        vars(connection)[_TURN] = turn
        return connection

    return connect


def _send(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def send(self: Any, conn: Any) -> Any:
        turn = vars(conn).get(_TURN)
        if turn is None:
            return await original(self, conn)
        try:
            return await original(self, conn)
        except _failures() as error:
            vars(conn).pop(_TURN).fail(kind_of(error, CLIENT), _message(error))
            raise
        except BaseException:
            vars(conn).pop(_TURN).withdraw()
            raise

    return send


def _start(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def start(self: Any, connection: Any) -> Any:
        raw = getattr(connection, "raw", None)
        if isinstance(raw, bytes):
            connection.protocol.data_received(raw)
            return await original(self, connection)
        turn = vars(connection).pop(_TURN, None)
        if turn is None:
            return await original(self, connection)
        with turn.sending(*_failures(), module=CLIENT, text=_message):
            response = await original(self, connection)
            tee = turn.tee(self.status, self.reason, self.headers.items())
            if tee is not None:
                _show_while_read(self.content, tee)
                return response
            content = await self.content.read()
        await turn.afinish(turn.answer(self.status, self.reason, self.headers.items(), content))
        if content:
            self.content = _again(content)
        return response

    return start


def _show_while_read(content: Any, tee: Tee) -> None:
    """Show a stream of an answer while its client reads it: every way to read takes its chunks by one method."""
    kind = type(content)

    class Teed(kind):  # type: ignore[misc,valid-type]
        __slots__ = ()

        def _read_nowait_chunk(self, n: int) -> bytes:
            data: bytes = tee.take(super()._read_nowait_chunk(n))
            if self.at_eof():
                tee.end(is_plain=True)
            return data

        def feed_eof(self) -> None:
            super().feed_eof()
            if self.at_eof():
                tee.end(is_plain=True)

        def set_exception(self, exc: Any, *args: Any) -> None:
            if isinstance(exc, BaseException):
                tee.fail(kind_of(exc, CLIENT), str(exc))
            super().set_exception(exc, *args)

    content.__class__ = Teed


def _again(content: bytes) -> Any:
    """Return a new stream with the bytes that were read."""
    from aiohttp.base_protocol import BaseProtocol
    from aiohttp.streams import StreamReader

    loop = asyncio.get_running_loop()
    stream = StreamReader(BaseProtocol(loop), max(len(content), 1 << 16), loop=loop)
    stream.feed_data(content)
    stream.feed_eof()
    return stream


def _ws_connect(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def ws_connect(self: Any, url: Any, *args: Any, **kwargs: Any) -> Any:
        if (refusal := refuse("websockets", "GET", str(url))) is not None:
            raise refusal
        with passing():
            return await original(self, url, *args, **kwargs)

    return ws_connect


PATCHES = (
    Patch("aiohttp.connector", "BaseConnector.connect", _connect),
    Patch("aiohttp.client_reqrep", "ClientRequest.send", _send),
    Patch("aiohttp.client_reqrep", "ClientResponse.start", _start),
    Patch("aiohttp.client", "ClientSession._ws_connect", _ws_connect),
)
