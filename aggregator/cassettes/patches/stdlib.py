"""http.client, and the libraries that use it: urllib.request, xmlrpc, httplib2.

A connection collects its request. Once the request is complete, it is played from the tape, or sent. A connection older
than the cassette therefore works like any other.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from typing import Any

from aggregator.cassettes.clients import kind_of, raw_reply, standard_error, to_bytes, to_request
from aggregator.cassettes.lineage import passing
from aggregator.cassettes.traffic import Turn, begin, is_wanted, leaves_out
from aggregator.errors import CassetteError, CassetteMissError
from aggregator.patching import Patch
from aggregator.records import HTTPReply, HTTPRequest

_SENT = "_aggregator_sent"
_TURN = "_aggregator_turn"
_MISS = "_aggregator_miss"
_LEFT_OUT = "_aggregator_left_out"
_POOLED = {"urllib3": "urllib3", "botocore": "boto3"}  # these ask their pools, which are patched


def client_of(connection: Any) -> str:
    """Return the library of a connection."""
    for kind in type(connection).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in _POOLED:
            return _POOLED[root]
        if root == "httplib2":
            return "httplib2"
    return "http.client"


class _Bytes:
    """A socket that holds an answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any, **__: Any) -> BytesIO:
        return BytesIO(self._data)


def http_response(reply: HTTPReply, method: str) -> http.client.HTTPResponse:
    """Return an answer as the standard library's response."""
    response = http.client.HTTPResponse(_Bytes(raw_reply(reply, method)), method=method)  # type: ignore[arg-type]
    response.begin()
    return response


def parse_request(sent: bytes, base: str) -> HTTPRequest:
    r"""Return the request that was about to be sent to `base`, with a chunked body joined.

    >>> asked = parse_request(b"POST /v1 HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\nbody", "http://x")
    >>> asked.method, asked.url, asked.body, dict(asked.headers)
    ('POST', 'http://x/v1', b'body', {'Host': 'x', 'A': 'b'})
    """
    head, _, body = sent.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, _, rest = first.partition(" ")
    target = rest.rpartition(" ")[0]
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    if any(name.lower() == "transfer-encoding" and "chunked" in value for name, value in headers.items()):
        body = _dechunked(body)
    url = f"{base}{target}" if target.startswith(("/", "*")) else target
    return to_request(method, url, body, headers)


def _dechunked(body: bytes) -> bytes:
    parts, at = [], 0
    while (end := body.find(b"\r\n", at)) > 0:
        size = int(body[at:end].partition(b";")[0] or b"0", 16)
        if not size:
            break
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)


def _base(connection: Any) -> str:
    scheme = "https" if isinstance(connection, http.client.HTTPSConnection) else "http"
    tunnel = vars(connection).get("_tunnel_host")
    host, port = (tunnel, vars(connection)["_tunnel_port"]) if tunnel else (connection.host, connection.port)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{scheme}://{host}" if port in (None, {"http": 80, "https": 443}[scheme]) else f"{scheme}://{host}:{port}"


def _is_served(connection: Any) -> bool:
    client = client_of(connection)
    return client not in _POOLED.values() and is_wanted(client)


def _putrequest(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def putrequest(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in (_SENT, _MISS, _LEFT_OUT):
            vars(self).pop(name, None)
        if (unread := vars(self).pop(_TURN, None)) is not None:
            unread.withdraw()
        client = client_of(self)
        url = str(kwargs["url"] if "url" in kwargs else args[1])
        if is_wanted(client) and leaves_out(client, url if "://" in url else f"{_base(self)}{url}"):
            vars(self)[_LEFT_OUT] = True
            return original(self, *args, **kwargs)
        if client in _POOLED.values() and is_wanted(client):
            raise CassetteError(
                f"Expected a request of {client} through its pool or client, got one by a bare connection, which a "
                "cassette cannot serve; use urllib3.PoolManager"
            )
        if _is_served(self):
            vars(self)[_SENT] = []
        return original(self, *args, **kwargs)

    return putrequest


def _send(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def send(self: Any, data: Any) -> Any:
        sent = vars(self).get(_SENT)
        if sent is None:
            return original(self, data)
        sent.append(to_bytes(data, _base(self)))
        return None

    return send


def _connect(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def connect(self: Any) -> Any:
        """Connect, unless a tape may answer the request: then connect when it must be sent."""
        return None if _is_served(self) and _LEFT_OUT not in vars(self) else original(self)

    return connect


def _request(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def request(self: Any, *args: Any, **kwargs: Any) -> None:
        """Ask the tape once the request is complete, because urllib and httplib2 handle failed connections here.

        A miss is raised when the answer is read.
        """
        original(self, *args, **kwargs)
        if _SENT in vars(self) and _is_complete(b"".join(vars(self)[_SENT])):
            try:
                _ask(self)
            except CassetteMissError as miss:
                vars(self)[_MISS] = miss

    return request


def _is_complete(data: bytes) -> bool:
    """Return True if the body is complete."""
    head, _, body = data.partition(b"\r\n\r\n")
    if b"\r\ntransfer-encoding:" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    length = _LENGTH.search(head)
    return length is None or len(body) >= int(length[1])


_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_ANSWERING = ("builtins.TimeoutError", "builtins.Connection", "builtins.BrokenPipeError", "http.client.")


def _ask(connection: Any) -> Turn:
    """Begin the turn of the collected request, and send it if no answer is recorded.

    Raises a connection failure, live or recorded, as the connection itself would; a failure of the answer is raised
    when the answer is read.
    """
    data = b"".join(vars(connection)[_SENT])
    request = parse_request(data, _base(connection))
    turn = begin(client_of(connection), request)  # after a miss the same request is refused again
    del vars(connection)[_SENT]
    if turn.failure is not None:
        kind = turn.failure.kind
        if kind == "builtins.ConnectionRefusedError" or not kind.startswith(_ANSWERING):
            connection.close()
            raise standard_error(kind, turn.failure.message)
    elif turn.reply is None:
        if turn.tape is not None and turn.tape.rules.like_vcrpy:
            data = _in_one_piece(data, request.body)
        with passing():
            try:
                connection.send(data)
            except (OSError, http.client.HTTPException) as error:
                turn.fail("socket.timeout" if isinstance(error, TimeoutError) else kind_of(error), str(error))
                raise
            except BaseException:
                turn.withdraw()
                raise
    vars(connection)[_TURN] = turn
    return turn


def _getresponse(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def getresponse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (miss := vars(self).pop(_MISS, None)) is not None:
            raise miss
        if _SENT in vars(self):
            _ask(self)
        turn: Turn | None = vars(self).pop(_TURN, None)
        if turn is None:
            return original(self, *args, **kwargs)
        if turn.failure is not None:
            self.close()
            raise standard_error(turn.failure.kind, turn.failure.message)
        if turn.reply is None:
            with turn.sending(OSError, http.client.HTTPException):
                response = original(self, *args, **kwargs)
                content = response.read()
            turn.finish(turn.answer(response.status, response.reason, response.getheaders(), content))
            return response_again(response, content, turn.request.method)
        turn.wait()
        self._HTTPConnection__state = "Idle"
        self._HTTPConnection__response = None
        return http_response(turn.reply, turn.request.method)

    return getresponse


def _in_one_piece(data: bytes, body: bytes) -> bytes:
    """Return a request whose chunked body is sent with its length."""
    lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
    plain = [line for line in lines if not line.lower().startswith(b"transfer-encoding:")]
    if len(plain) < len(lines):
        data = b"\r\n".join([*plain, b"Content-Length: %d" % len(body), b"", body])
    return data


def response_again(response: http.client.HTTPResponse, content: bytes, method: str) -> http.client.HTTPResponse:
    """Return an answer whose body was read, so that it can be read once more."""
    if response.chunked:
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content) if content else b"0\r\n\r\n"
    fields = [f"{name}: {value}" for name, value in response.getheaders()]
    head = "\r\n".join([f"HTTP/1.1 {response.status} {response.reason}", *fields, "", ""])
    again = http.client.HTTPResponse(_Bytes(head.encode("latin-1") + content), method=method)  # type: ignore[arg-type]
    again.begin()
    return again


def _putheader(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def putheader(self: Any, header: Any, *values: Any) -> Any:
        """Accept lists of values too, as vcrpy does."""
        if _SENT in vars(self):
            values = tuple(one for value in values for one in (value if isinstance(value, list | tuple) else (value,)))
        return original(self, header, *values)

    return putheader


PATCHES = (
    Patch("http.client", "HTTPConnection.request", _request),
    Patch("http.client", "HTTPConnection.putrequest", _putrequest),
    Patch("http.client", "HTTPConnection.putheader", _putheader),
    Patch("http.client", "HTTPConnection.send", _send),
    Patch("http.client", "HTTPConnection.connect", _connect),
    Patch("http.client", "HTTPConnection.getresponse", _getresponse),
    Patch("http.client", "HTTPSConnection.connect", _connect),
    Patch("httplib2", "HTTPConnectionWithTimeout.connect", _connect),
    Patch("httplib2", "HTTPSConnectionWithTimeout.connect", _connect),
)
