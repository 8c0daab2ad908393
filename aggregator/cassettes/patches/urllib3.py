"""urllib3, requests and boto3: one attempt of a connection pool, on any of its connections."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from functools import cache, cached_property, wraps
from http.client import HTTPException
from io import BytesIO
from socket import gaierror
from typing import Any

from aggregator.cassettes.clients import headers_of, kind_of, standard_error, to_bytes, to_request
from aggregator.cassettes.lineage import passing
from aggregator.cassettes.patches.stdlib import http_response, response_again
from aggregator.cassettes.tape import RecordedError
from aggregator.cassettes.traffic import Tee, Turn, begin, is_wanted, leaves_out
from aggregator.patching import Patch
from aggregator.records import HTTPReply

_TUNNEL = "_aggregator_tunnel"
_PORTS = {"http": 80, "https": 443}


def client_of(pool: Any) -> str:
    """Return the library of a pool: botocore has its own classes."""
    return "boto3" if any(kind.__module__ == "botocore.awsrequest" for kind in type(pool).__mro__) else "urllib3"


def _url(pool: Any, url: str) -> str:
    if not url.startswith("/"):
        return url  # absolute, for a proxy
    host = f"[{pool.host}]" if ":" in pool.host and not pool.host.startswith("[") else pool.host
    port = "" if pool.port is None or pool.port == _PORTS.get(pool.scheme) else f":{pool.port}"
    return f"{pool.scheme}://{host}{port}{url}"


class _Message:
    """The message that `requests` reads for cookies, and urllib3 for the body's end, to return the connection."""

    def __init__(self, headers: Any, body: BytesIO) -> None:
        self._headers, self._body, self._size = headers, body, len(body.getbuffer())

    @cached_property
    def msg(self) -> Message:
        message = Message()
        for name, value in self._headers.iteritems():
            message[name] = value
        return message

    def isclosed(self) -> bool:
        return self._body.closed or self._body.tell() >= self._size

    def close(self) -> None:
        pass


def _response(
    pool: Any, headers: Any, status: int, reason: str, body: bytes, request: tuple[str, str], options: Mapping[str, Any]
) -> Any:
    """Return urllib3's response (version 2) with this body; its connection is returned to the pool once it is read."""
    from urllib3 import HTTPHeaderDict

    method, url = request
    content, fields = BytesIO(body), HTTPHeaderDict(headers)
    return _response_class()(
        content,
        headers=fields,
        status=status,
        version=11,
        version_string="HTTP/1.1",
        reason=reason,
        preload_content=options.get("preload_content", True),
        decode_content=options.get("decode_content", True),
        original_response=_Message(fields, content),
        pool=pool,
        connection=options.get("response_conn"),
        retries=options.get("retries"),
        request_method=method,
        request_url=_url(pool, url),
        enforce_content_length=False,
    )


@cache
def _response_class() -> Any:
    from urllib3 import HTTPResponse

    class Response(HTTPResponse):
        """A response whose body can be read again after it was read completely, like vcrpy's."""

        def read(self, amt: int | None = None, *args: Any, **kwargs: Any) -> bytes:
            data = super().read(amt, *args, **kwargs)
            return data or (self._body if amt is None and isinstance(self._body, bytes) else data)

    return Response


def _raised(pool: Any, conn: Any, url: str, failure: RecordedError) -> Exception:
    """Return a recorded failure as an exception that a pool can retry, or explain."""
    from urllib3 import exceptions

    home, _, name = failure.kind.rpartition(".")
    kind = getattr(exceptions, name, None) if home == "urllib3" else None
    message = failure.message
    if isinstance(kind, type) and issubclass(kind, exceptions.HTTPError):
        if kind.__name__ == "NameResolutionError":  # of version 2
            reason = re.search(r"\[Errno (-?\d+)\] ([^)]*)", message)
            known = (int(reason[1]), reason[2]) if reason else (message,)
            return kind(conn.host, conn, gaierror(*known))
        if issubclass(kind, exceptions.NewConnectionError):
            return exceptions.NewConnectionError(conn, message)
        if issubclass(kind, exceptions.ConnectTimeoutError):
            return exceptions.ConnectTimeoutError(conn, message)
        if issubclass(kind, exceptions.ReadTimeoutError):
            return exceptions.ReadTimeoutError(pool, url, message)
        if issubclass(kind, exceptions.ProxyError):
            return exceptions.ProxyError(message, OSError(message))
        return exceptions.SSLError(message) if kind is exceptions.SSLError else exceptions.ProtocolError(message)
    if home in ("builtins", "socket", "ssl", "http.client"):
        return standard_error(failure.kind, message)
    plain = standard_error(failure.kind, message)
    if isinstance(plain, TimeoutError):
        return exceptions.ReadTimeoutError(pool, url, message)
    return exceptions.NewConnectionError(conn, message)


def _message(error: BaseException) -> str:
    return getattr(error, "_message", None) or str(error)


def _tunnel(pool: Any, conn: Any) -> None:
    """Open the deferred tunnel through a proxy."""
    if vars(conn).pop(_TUNNEL, False) and conn.sock is None:
        pool._prepare_proxy(conn)  # noqa: SLF001 - as `urlopen` does, of the same pool


def _make_request(original: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)
    returns_own = "preload_content" in names  # version 2; before, the standard library's response

    @wraps(original)
    def make_request(self: Any, conn: Any, method: str, url: str, *args: Any, **options: Any) -> Any:
        client = client_of(self)
        if not is_wanted(client):
            return original(self, conn, method, url, *args, **options)
        if leaves_out(client, _url(self, url)):
            with passing():
                _tunnel(self, conn)
                return original(self, conn, method, url, *args, **options)
        from urllib3.exceptions import HTTPError

        options.update(zip(names[4:], args, strict=False))
        whole, body = _url(self, url), options.get("body")
        if not isinstance(body, bytes | str | None):
            options["body"] = to_bytes(body, whole)
        headers = self.headers if options.get("headers") is None else options["headers"]
        turn = begin(client, to_request(method, whole, options.get("body"), headers))
        if turn.failure is not None:
            raise _raised(self, conn, url, turn.failure)
        if turn.reply is not None:
            turn.wait()
            return _played(self, turn.reply, (method, url), options, returns_own=returns_own)
        with turn.sending(HTTPError, OSError, HTTPException, module="urllib3", text=_message):
            _tunnel(self, conn)
            raw = {"preload_content": False, "decode_content": False, "response_conn": None}
            asked = options | (raw if returns_own else {})
            response = original(self, conn, method, url, **asked)
            if returns_own and not options.get("preload_content", True):
                tee = turn.tee(response.status, response.reason, response.headers.items())
                if tee is not None:
                    return _teed(self, response, tee, options)
            content = response.read()
        return _recorded(self, turn, response, content, (method, url), options, returns_own=returns_own)

    return make_request


def _teed(pool: Any, response: Any, tee: Tee, options: Mapping[str, Any]) -> Any:
    """Return a streamed answer that is shown while its client reads it."""
    from urllib3.exceptions import HTTPError
    from urllib3.util.response import is_fp_closed

    kind = type(response)

    class Teed(kind):  # type: ignore[misc,valid-type]
        def read(self, *args: Any, **kwargs: Any) -> bytes:
            return self._shown(super().read, *args, **kwargs)  # type: ignore[no-any-return]

        def read1(self, *args: Any, **kwargs: Any) -> bytes:
            return self._shown(super().read1, *args, **kwargs)  # type: ignore[no-any-return]

        def read_chunked(self, *args: Any, **kwargs: Any) -> Iterator[bytes]:
            pieces = super().read_chunked(*args, **kwargs)
            while (piece := self._shown(next, pieces, None)) is not None:
                yield piece
            tee.end(is_plain=True)

        def close(self) -> None:
            tee.end(is_plain=True)
            super().close()

        def _shown(self, read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                piece = read(*args, **kwargs)
            except (HTTPError, OSError, HTTPException) as error:
                tee.fail(kind_of(error, "urllib3"), str(error))
                raise
            if piece:
                tee.take(piece)
            if is_fp_closed(self._fp):
                tee.end(is_plain=True)
            return piece

    response.__class__ = Teed
    response._connection, response._pool = options.get("response_conn"), pool  # noqa: SLF001 - as the pool does
    response.decode_content = options.get("decode_content", True)
    return response


def _played(
    pool: Any, reply: HTTPReply, request: tuple[str, str], options: Mapping[str, Any], *, returns_own: bool
) -> Any:
    if not returns_own:
        return http_response(reply, request[0])
    headers = headers_of(reply, request[0], titled=True)
    return _response(pool, headers, reply.status, reply.reason, reply.body, request, options)


def _recorded(
    pool: Any,
    turn: Turn,
    response: Any,
    content: bytes,
    request: tuple[str, str],
    options: Mapping[str, Any],
    *,
    returns_own: bool,
) -> Any:
    """Record a live answer and return it once more, because it was read to its end."""
    if not returns_own:
        turn.finish(turn.answer(response.status, response.reason, response.getheaders(), content))
        return response_again(response, content, request[0])
    headers = response.headers
    turn.finish(turn.answer(response.status, response.reason, headers.items(), content))
    return _response(pool, headers, response.status, response.reason or "", content, request, options)


def _prepare_proxy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Defer the tunnel through a proxy until the request must be sent."""

    @wraps(original)
    def prepare_proxy(self: Any, conn: Any) -> Any:
        if not is_wanted(client_of(self)):
            return original(self, conn)
        vars(conn)[_TUNNEL] = True
        return None

    return prepare_proxy


PATCHES = (
    Patch("urllib3.connectionpool", "HTTPConnectionPool._make_request", _make_request),
    Patch("urllib3.connectionpool", "HTTPSConnectionPool._prepare_proxy", _prepare_proxy),
)
