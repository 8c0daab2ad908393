"""HTTP over aiohttp: one session per event loop, made on first use and closed with its loop.

The only import of aiohttp in the package. The defaults differ from aiohttp's where measuring showed a reason
(`docs/models.md`): connections kept 4 s, since servers close them after 5 and a POST on a dying one is lost; no limit
of 100 connections; no redirects, which turn a POST into a GET; no cookies; 5 s to connect.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import lru_cache
from time import perf_counter
from types import TracebackType
from typing import Any, Self
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.tracing import Trace
from msgspec import Struct
from yarl import URL

from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError
from aggregator.llm.retry import NOT_SENT
from aggregator.protocols import StreamedReply, Transport
from aggregator.records import HTTPReply, HTTPRequest

CONNECT_TIMEOUT = 5.0
KEEPALIVE_TIMEOUT = 4.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}

_made_connection: ContextVar[bool] = ContextVar("aggregator_made_connection", default=True)


class _Connector(aiohttp.TCPConnector):
    """Tells whether the request at hand had to open a connection or was given a used one."""

    async def _create_connection(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        _made_connection.set(True)
        return await super()._create_connection(req, traces, timeout)


class _Sessions(Struct):
    """What one event loop uses: `pooled` for every request, `single` (made when needed) for connections used once."""

    pooled: aiohttp.ClientSession
    single: aiohttp.ClientSession | None
    lifetime: AsyncGenerator[None, None]
    proxies: Mapping[str, str]

    def request(self, session: aiohttp.ClientSession, request: HTTPRequest) -> Awaitable[aiohttp.ClientResponse]:
        """Begin a request on one of the two."""
        url = _parsed(request.url)
        return session.request(
            request.method,
            url,
            data=request.body,
            headers=request.headers,
            allow_redirects=False,
            proxy=_proxy(self.proxies, url) if self.proxies else None,
        )

    async def close(self) -> None:
        """Close every connection; one more turn of the loop lets the sockets go."""
        for session in (self.pooled, self.single):
            if session is not None:
                await session.close()
        await asyncio.sleep(0)


class AiohttpTransport(Transport):
    """The transport of production; one object serves any number of clients, threads and event loops.

    Nothing has to be closed by hand: the sessions of a loop close when the loop shuts its async generators down,
    which `asyncio.run`, pytest-asyncio and the library's own loop do.
    """

    def __init__(
        self, *, connect_timeout: float = CONNECT_TIMEOUT, keepalive_timeout: float = KEEPALIVE_TIMEOUT
    ) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout)
        self._keepalive = keepalive_timeout
        self._loops: dict[asyncio.AbstractEventLoop, _Sessions] = {}
        self._lock = threading.Lock()

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        """Send one request and return the whole answer.

        A used connection that dies before the first byte of the answer is replaced by a new one, once and at once:
        the server had closed it while idle and never read the request.
        """
        started = perf_counter()
        try:
            async with asyncio.timeout(timeout):
                response = await self._open(request)
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise _failure(error, request.url, timeout) from error
        return HTTPReply(
            status=response.status,
            body=body,
            headers={name.lower(): value for name, value in response.headers.items()},
            reason=response.reason or "",
            milliseconds=(perf_counter() - started) * 1e3,
        )

    @asynccontextmanager
    async def open(self, request: HTTPRequest, *, timeout: float | None = None) -> AsyncIterator[StreamedReply]:
        """Send one request and hand out the answer as soon as its head is there; leaving the block ends the request."""
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._open(request)
        except (aiohttp.ClientError, OSError) as error:
            raise _failure(error, request.url, timeout) from error
        try:
            yield _Streamed(response, request.url, timeout, deadline)
        finally:
            response.close()

    async def _open(self, request: HTTPRequest) -> aiohttp.ClientResponse:
        sessions = self._loops.get(asyncio.get_running_loop()) or await self._start()
        _made_connection.set(False)
        try:
            return await sessions.request(sessions.pooled, request)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if _made_connection.get() or _has_begun(error):
                raise
        except ValueError as error:
            if (refusal := _refusal(request)) is not None:
                raise refusal from error
            raise
        # Not from the pool again: its other connections have died of the same cause.
        if sessions.single is None:
            sessions.single = self._session(force_close=True)
        return await sessions.request(sessions.single, request)

    async def _start(self) -> _Sessions:
        """Make this loop's sessions, and tie their life to the loop's."""
        loop = asyncio.get_running_loop()
        lifetime = self._lifetime(loop)
        sessions = _Sessions(self._session(), None, lifetime, getproxies())
        with self._lock:
            for ended in [other for other in self._loops if other.is_closed()]:
                _discard(self._loops.pop(ended))
            self._loops[loop] = sessions
        await anext(lifetime)  # from now on the loop closes it when it shuts down; does not give up the turn
        return sessions

    async def _lifetime(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with self._lock:
                sessions = self._loops.pop(loop, None)
            if sessions is not None:
                await sessions.close()

    def _session(self, *, force_close: bool = False) -> aiohttp.ClientSession:
        keepalive = {} if force_close else {"keepalive_timeout": self._keepalive}
        return aiohttp.ClientSession(
            connector=_Connector(limit=0, force_close=force_close, **keepalive),  # type: ignore[arg-type]
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
        )

    async def aclose(self) -> None:
        """Close this loop's connections now; the next request opens new ones."""
        sessions = self._loops.get(asyncio.get_running_loop())
        if sessions is not None:
            await sessions.lifetime.aclose()

    def discard(self) -> None:
        """Drop what belongs to loops that were closed without shutting down."""
        with self._lock:
            for loop in [loop for loop in self._loops if loop.is_closed()]:
                _discard(self._loops.pop(loop))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Streamed:
    """A StreamedReply of aiohttp."""

    def __init__(
        self, response: aiohttp.ClientResponse, url: str, timeout: float | None, deadline: float | None
    ) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self.reason = response.reason or ""
        self._response, self._url, self._timeout, self._deadline = response, url, timeout, deadline

    async def pieces(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    piece = await self._response.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                raise _failure(error, self._url, self._timeout) from error
            if not piece:
                return
            yield piece


def _has_begun(error: aiohttp.ClientError) -> bool:
    """Tell whether a part of the answer's head had come: then the server has worked on the request."""
    return isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)


def _refusal(request: HTTPRequest) -> ConfigError | None:
    """What is wrong with a request that HTTP cannot carry; never with the value, which may be the key."""
    try:
        _parsed(request.url)
    except ValueError as error:
        return ConfigError(f"Expected an http(s) address as base_url, got {request.url!r}: {error}")
    for name, value in request.headers.items():
        if not value.isprintable():
            return ConfigError(
                f"Expected the header {name!r} as printable text, got one with a line break or control character; "
                "is there one around the key? strip() it"
            )
    return None


def _failure(error: Exception, url: str, timeout: float | None) -> Exception:
    """Turn aiohttp's error into ours."""
    host = URL(url).host or url
    match error:
        case aiohttp.InvalidURL():
            return ConfigError(f"Expected an http(s) address as base_url, got {url!r}")
        case aiohttp.ConnectionTimeoutError():
            return APITimeoutError(f"{NOT_SENT}{host} took no connection within {CONNECT_TIMEOUT:g} s")
        case aiohttp.ClientConnectorError():
            return APIConnectionError(f"{NOT_SENT}no connection to {host}:{error.port}: {error.strerror or error}")
        case aiohttp.ClientHttpProxyError():
            return APIConnectionError(f"{NOT_SENT}the proxy refused {host}: {error.status} {_words(error.message)}")
        case aiohttp.ClientResponseError():  # its repr holds the request's headers, and the key in them
            return APIConnectionError(f"{host} gave an answer that cannot be read: {_words(error.message)}")
        case aiohttp.ClientError():
            return APIConnectionError(f"{host} closed the connection before its answer was whole ({_words(error)})")
        case TimeoutError():
            limit = "in time" if timeout is None else f"within {timeout:.3g} s"
            return APITimeoutError(f"{host} gave no whole answer {limit}")
        case _:
            return APIConnectionError(f"the connection to {host} broke: {error!r}")


def _words(error: object) -> str:
    """What an error of aiohttp says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@lru_cache(maxsize=512)
def _parsed(url: str) -> URL:
    return URL(url)


@lru_cache(maxsize=512)
def _proxy_of_host(scheme_proxy: str | None, host: str) -> str | None:
    return None if host in _LOOPBACK or proxy_bypass(host) else scheme_proxy


def _proxy(proxies: Mapping[str, str], url: URL) -> str | None:
    """The proxy of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; aiohttp's own way takes a thread per request."""
    return _proxy_of_host(proxies.get(url.scheme) or proxies.get("all"), url.host or "")


def _discard(sessions: _Sessions) -> None:
    """Mark the sessions of a closed loop as closed; on such a loop `close` never waits."""
    with contextlib.suppress(StopIteration, RuntimeError):
        coroutine: Any = sessions.close()
        coroutine.send(None)
        coroutine.close()


@lru_cache(maxsize=1)
def shared_transport() -> AiohttpTransport:
    """The process's own transport: clients of one loop share its connections."""
    transport = AiohttpTransport()
    atexit.register(transport.discard)
    return transport
