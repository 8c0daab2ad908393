"""HTTP over aiohttp: one session per event loop, made on first use and closed with its loop.

The only import of aiohttp in the package. The defaults differ from aiohttp's for measured reasons (`docs/models.md`):
connections are kept for 4 s, since servers close them after 5 and a POST on a closing one is lost; no limit of 100
connections; no redirects, which turn a POST into a GET; no cookies; 5 s to connect; reads of 64 KB.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import re
import socket
import threading
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from inspect import signature
from time import perf_counter
from types import TracebackType
from typing import Any, Self
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest
from aiohttp.hdrs import CONTENT_ENCODING
from aiohttp.tracing import Trace
from msgspec import Struct
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError, TooLargeError
from aggregator.llm.retry import NOT_SENT
from aggregator.protocols import StreamedReply, Transport
from aggregator.records import HTTPReply, HTTPRequest

MAX_BODY = 64 << 20
"""The most bytes that an answer may have, decompressed; the largest recorded has 4 MB."""
MAX_HEADER = 1 << 20
"""The most bytes of one response header; gateways were seen to send policies and cookies of 9 KB."""
_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, number
_READ = 64 << 10  # bytes; for asyncio's 256 KB the system maps and unmaps memory at every read
CONNECT_TIMEOUT = 5.0
KEEPALIVE_TIMEOUT = 4.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_TCP = socket.IPPROTO_TCP
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *[(_TCP, getattr(socket, name), value) for name, value in _PROBES.items() if hasattr(socket, name)],
]


# ---- sessions


class _Connector(aiohttp.TCPConnector):
    """Makes the system probe silent connections, so that one dropped by a NAT or firewall is noticed."""

    async def _create_connection(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        connection = await super()._create_connection(req, traces, timeout)
        transport: Any = connection.transport
        if hasattr(transport, "max_size"):  # asyncio's own, without TLS
            transport.max_size = _READ
        own = None if transport is None else transport.get_extra_info("socket")
        if own is not None:
            with contextlib.suppress(OSError):  # no TCP, or closed meanwhile
                for level, option, value in _KEEPALIVE:
                    own.setsockopt(level, option, value)
        return connection


class _Sessions(Struct):
    """The sessions of one event loop: `pooled` for every request, `single` (if needed) for connections used once."""

    pooled: aiohttp.ClientSession
    single: aiohttp.ClientSession | None
    lifetime: AsyncGenerator[None, None]
    proxies: Mapping[str, str]

    async def close(self) -> None:
        """Close every connection; the sockets are released in the next turn of the loop."""
        for session in (self.pooled, self.single):
            if session is not None:
                await session.close()
        await asyncio.sleep(0)


_MAX_HEADERS: Any = {"max_headers": 4096} if "max_headers" in signature(aiohttp.ClientSession).parameters else {}


# ---- the transport


class AiohttpTransport(Transport):
    """The transport of production; one object serves any number of clients, threads and event loops.

    It closes itself: the sessions of a loop close when the loop shuts its async generators down, as `asyncio.run`,
    pytest-asyncio and the library's own loop do.
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

        It is sent once only, since a connection that breaks before any answer may have delivered it.
        """
        started, loop = perf_counter(), asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(None if timeout is None else loop.time() + timeout):
                response = await self._open(request, loop)
                body = await _body(response, request.url)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise _failure(error, request.url, timeout) from _stripped(error)
        return HTTPReply(
            status=response.status,
            body=body,
            headers={name.lower(): value for name, value in response.headers.items()},
            reason=response.reason or "",
            milliseconds=(perf_counter() - started) * 1e3,
        )

    @asynccontextmanager
    async def open(self, request: HTTPRequest, *, timeout: float | None = None) -> AsyncIterator[StreamedReply]:
        """Send one request and yield the answer once its head has arrived; leaving the block ends the request."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._open(request, loop)
        except (aiohttp.ClientError, OSError) as error:
            raise _failure(error, request.url, timeout) from _stripped(error)
        try:
            yield _Streamed(response, request.url, timeout, deadline)
        finally:
            response.close()

    async def _open(self, request: HTTPRequest, loop: asyncio.AbstractEventLoop) -> aiohttp.ClientResponse:
        sessions = self._loops.get(loop) or await self._start(loop)
        session = sessions.pooled
        if request.fresh:
            if sessions.single is None:
                sessions.single = self._session(force_close=True)
            session = sessions.single
        try:
            url = _parsed(request.url)
            return await session.request(
                request.method,
                url,
                data=request.body,
                headers=request.headers,
                allow_redirects=False,
                proxy=_proxy(sessions.proxies, url) if sessions.proxies else None,
            )
        except ValueError:
            if (refusal := _refusal(request)) is not None:
                raise refusal from None  # the cause may quote the key
            raise

    async def _start(self, loop: asyncio.AbstractEventLoop) -> _Sessions:
        """Make this loop's sessions, which close with the loop."""
        lifetime = self._lifetime(loop)
        sessions = _Sessions(self._session(), None, lifetime, getproxies())
        with self._lock:
            for ended in [other for other in self._loops if other.is_closed()]:
                _discard(self._loops.pop(ended))
            self._loops[loop] = sessions
        await anext(lifetime)  # the loop now closes it when it shuts down; does not yield to other tasks
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
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            **_MAX_HEADERS,
        )

    async def aclose(self) -> None:
        """Close this loop's connections now; the next request opens new ones."""
        sessions = self._loops.get(asyncio.get_running_loop())
        if sessions is not None:
            await sessions.lifetime.aclose()

    def discard(self) -> None:
        """Drop the sessions of loops that were closed without shutting down."""
        with self._lock:
            for loop in [loop for loop in self._loops if loop.is_closed()]:
                _discard(self._loops.pop(loop))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _body(response: aiohttp.ClientResponse, url: str) -> Awaitable[bytes]:
    """Return the whole body; raises TooLargeError for one that is too large."""
    length = response.content_length
    if length is not None and length <= MAX_BODY and CONTENT_ENCODING not in response.headers:
        return response.read()
    return _counted(response, url)


def _codings(response: aiohttp.ClientResponse) -> list[Any]:
    """Return decompressors for codings that aiohttp passes on: `x-gzip`, several in one."""
    names = [name.strip().lower() for name in response.headers.get(CONTENT_ENCODING, "").split(",")]
    if len(names) == 1 and not names[0].startswith("x-"):
        return []
    known = [name for name in reversed(names) if name.removeprefix("x-") in ("gzip", "deflate")]
    return [zlib.decompressobj(47) for _ in known]


def _decoded(piece: bytes, codings: list[Any]) -> bytes:
    """Return the content of the next bytes; raises ClientPayloadError for bytes of another coding."""
    try:
        for coding in codings:
            piece = coding.decompress(piece, MAX_BODY + 1)
    except zlib.error as error:
        raise aiohttp.ClientPayloadError(f"its body is not in the coding that it states: {error}") from None
    return piece


async def _counted(response: aiohttp.ClientResponse, url: str) -> bytes:
    pieces, size, codings = [], 0, _codings(response)
    try:
        while piece := await response.content.readany():
            if codings:
                piece = _decoded(piece, codings)
            pieces.append(piece)
            size = _added(size, piece, response, url)
    except BaseException:  # as aiohttp's own read() does
        response.close()
        raise
    return b"".join(pieces)


def _added(size: int, piece: bytes, response: aiohttp.ClientResponse, url: str) -> int:
    """Return the size with one more piece; raises TooLargeError, and ends the answer, beyond the limit."""
    size += len(piece)
    if size > MAX_BODY:
        response.close()
        raise TooLargeError(
            f"Expected an answer of at most {MAX_BODY >> 20} MB from {URL(url).host}, got more", status=response.status
        )
    return size


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
        size, codings = 0, _codings(self._response)
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    piece = await self._response.content.readany()
                if not piece:
                    return
                piece = _decoded(piece, codings)
            except (aiohttp.ClientError, OSError) as error:
                raise _failure(error, self._url, self._timeout) from _stripped(error)
            size = _added(size, piece, self._response, self._url)
            if piece:
                yield piece


# ---- errors


def _refusal(request: HTTPRequest) -> ConfigError | None:
    """Describe why HTTP cannot carry a request, without the value, which may be the key."""
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
        case aiohttp.ClientProxyConnectionError():
            proxy = f"{error.host}:{error.port}"
            return APIConnectionError(f"{NOT_SENT}no connection to the proxy {proxy}: {error.strerror or error}")
        case aiohttp.ClientConnectorError():
            return APIConnectionError(f"{NOT_SENT}no connection to {host}:{error.port}: {error.strerror or error}")
        case aiohttp.ClientHttpProxyError():
            return APIConnectionError(f"{NOT_SENT}the proxy refused {host}: {error.status} {_words(error.message)}")
        case aiohttp.ClientResponseError():
            return APIConnectionError(f"Expected an HTTP response from {host}, got {_words(error.message)}")
        case aiohttp.ClientError():
            return APIConnectionError(f"Expected a whole answer from {host}, got a closed connection: {_words(error)}")
        case TimeoutError():
            limit = "in time" if timeout is None else f"within {timeout:.3g} s"
            return APITimeoutError(f"Expected a whole answer from {host} {limit}, got none")
        case _:
            return APIConnectionError(f"Expected a whole answer from {host}, got a broken connection: {error!r}")


def _stripped(error: Exception) -> Exception:
    """Return the error without the request's headers and the proxy's password, which the repr of a cause would show."""
    if isinstance(error, aiohttp.ClientResponseError):
        asked, none = error.request_info, CIMultiDictProxy(CIMultiDict[str]())
        error.request_info = aiohttp.RequestInfo(asked.url, asked.method, none, asked.real_url)
        error.history = ()
    if isinstance(error, aiohttp.ClientError):
        error.args = (str(error),)
    return error


def _words(error: object) -> str:
    """Return the message of an error of aiohttp on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- addresses and proxies


@lru_cache(maxsize=512)
def _parsed(url: str) -> URL:
    return URL(url)


def _proxy(proxies: Mapping[str, str], url: URL) -> str | None:
    """Return the proxy of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; aiohttp's lookup takes a thread per call."""
    scheme = url.scheme if proxies.get(url.scheme) else "all"
    return _proxy_of_host(scheme, proxies.get(scheme), url.host or "")


@lru_cache(maxsize=512)
def _proxy_of_host(scheme: str, proxy: str | None, host: str) -> str | None:
    """Return the proxy for a host as a URL; raises ConfigError for one that is not an HTTP proxy."""
    if not proxy or host in _LOOPBACK or proxy_bypass(host):
        return None
    address = proxy if "://" in proxy else f"http://{proxy}"
    try:
        found = URL(address)
        usable = found.scheme in ("http", "https") and bool(found.host) and found.port != 0
    except ValueError:
        usable = False
    if usable:
        return address
    shown = re.sub(r"//.*@", "//***@", proxy)
    raise ConfigError(
        f"Expected an HTTP proxy in {scheme.upper()}_PROXY, got {shown!r}. SOCKS is not supported: give the address of "
        f"an http:// proxy, or add {host} to NO_PROXY"
    )


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
