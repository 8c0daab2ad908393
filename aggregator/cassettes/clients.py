"""Other HTTP clients: their names, and their requests, answers and failures as our records. Imports no client."""

from __future__ import annotations

import builtins
import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aggregator.cassettes.payloads import decompressed
from aggregator.errors import CassetteError, ConfigError
from aggregator.records import HTTPReply, HTTPRequest

FAMILIES: Mapping[str, str] = {
    "aiohttp": "aiohttp",
    "boto3": "boto3 and botocore",
    "http.client": "the standard library's http.client, urllib.request and xmlrpc",
    "httplib2": "httplib2",
    "httpx": "httpx and httpx2",
    "lm15": "lm15, the client that DSPy brings with it",
    "tornado": "tornado's AsyncHTTPClient",
    "urllib3": "urllib3 and requests",
}
"""Client -> what its patches cover."""

_ANY_TRANSPORT = ("aiohttp", "httpx", "urllib3")
RIDES_ON: Mapping[str, tuple[str, ...]] = {
    "aiobotocore": ("aiohttp", "httpx"),
    "anthropic": _ANY_TRANSPORT,
    "bedrock": ("boto3",),
    "botocore": ("boto3",),
    "cohere": _ANY_TRANSPORT,
    "dspy": (*_ANY_TRANSPORT, "boto3", "lm15"),
    "google-genai": _ANY_TRANSPORT,
    "groq": _ANY_TRANSPORT,
    "httpx2": ("httpx",),
    "huggingface_hub": _ANY_TRANSPORT,
    "langchain": _ANY_TRANSPORT,
    "litellm": (*_ANY_TRANSPORT, "boto3"),
    "mistralai": _ANY_TRANSPORT,
    "ollama": _ANY_TRANSPORT,
    "openai": _ANY_TRANSPORT,
    "requests": ("urllib3",),
    "urllib": ("http.client",),
}
"""Library -> the clients that may carry its requests: SDKs use another transport if one is given or installed."""

_REFRAMED = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def families(clients: str | Iterable[str]) -> frozenset[str]:
    """Return the clients for "all" or a list of names.

    >>> sorted(families(["openai", "http.client"]))
    ['aiohttp', 'http.client', 'httpx', 'urllib3']
    """
    names = tuple(FAMILIES) if clients == "all" else (clients,) if isinstance(clients, str) else tuple(clients)
    unknown = [name for name in names if name not in FAMILIES and name not in RIDES_ON]
    if unknown:
        known = ", ".join(sorted({*FAMILIES, *RIDES_ON}))
        raise ConfigError(f'Expected clients="all" or names of {known}; got {unknown[0]!r}')
    return frozenset(client for name in names for client in RIDES_ON.get(name, (name,)))


class _Headers(Mapping[str, str]):
    """Another client's headers, converted on access: a replay seldom needs them."""

    __slots__ = ("_given", "_made")

    def __init__(self, given: Mapping[Any, Any]) -> None:
        self._given = given
        self._made: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._made is None:
            self._made = {_header(name): _header(value) for name, value in self._given.items()}
        return self._made

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def to_request(method: str, url: str, body: Any, headers: Mapping[Any, Any]) -> HTTPRequest:
    """Return another client's request as ours, its method in upper case as HTTP defines the known ones.

    The redaction finds authentication in its headers and URL.
    """
    return HTTPRequest(
        method=method.upper(),
        url=url,
        body=body if type(body) is bytes else to_bytes(body, url),
        headers=_Headers(headers),
    )


def _header(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else str(value)


def to_bytes(body: Any, url: str) -> bytes:
    """Return any type of body that clients accept as bytes; a file or an iterator is read to its end.

    >>> to_bytes({"a": [1]}, "http://x/"), to_bytes(None, "http://x/"), to_bytes(iter([b"a", b"b"]), "http://x/")
    (b'{"a": [1]}', b'', b'ab')
    """
    if body is None or isinstance(body, bytes | bytearray | memoryview):
        return bytes(body or b"")
    if isinstance(body, str):
        return body.encode()
    if hasattr(body, "read"):
        return _read(body, url)
    try:
        if isinstance(body, dict | list | tuple) and not any(isinstance(part, bytes) for part in body):
            return json.dumps(body).encode()
        return b"".join(to_bytes(part, url) for part in body)
    except TypeError as error:
        raise CassetteError(
            f"Expected a body of bytes, text, JSON or an iterator of them, got {type(body).__name__} - at {url}; "
            "a cassette cannot compare such bodies: send bytes"
        ) from error


def _read(file: Any, url: str) -> bytes:
    """Read a file to its end; one read may return less."""
    parts = []
    while part := file.read(1 << 20):
        parts.append(to_bytes(part, url))
    return b"".join(parts)


def to_reply(
    status: int, reason: str | None, headers: Iterable[tuple[Any, Any]], body: bytes, *, decode: bool = True
) -> HTTPReply:
    """Return another client's answer as ours: header names in lower case, the body decompressed unless `decode=False`.

    Several headers of one name become lines of one text.
    """
    found: dict[str, str] = {}
    for given_name, given_value in headers:
        name, value = _header(given_name).lower(), _header(given_value)
        found[name] = f"{found[name]}\n{value}" if name in found else value
    coding = found.get("content-encoding", "")
    plain, coding = decompressed(body, coding) if decode else (body, coding)
    kept = {name: value for name, value in found.items() if name not in _REFRAMED}
    if "content-length" in found:  # for an answer to HEAD it is not the length of the body
        kept["content-length"] = str(len(plain)) if body else found["content-length"]
    return HTTPReply(
        status=status,
        reason=reason or "",
        headers=kept | ({"content-encoding": coding} if coding else {}),
        body=plain,
    )


def headers_of(reply: HTTPReply, method: str = "", *, titled: bool = False) -> list[tuple[str, str]]:
    """Return the headers of an answer for another client, with the length of the body that it gets.

    An answer to HEAD, or one without a body, keeps its stated length. `titled` names are capitalised, as most HTTP 1
    servers do.
    """
    headers = dict(reply.headers)
    if reply.body or "content-length" not in headers or not (method == "HEAD" or reply.status == 304):
        headers["content-length"] = str(len(reply.body))
    return [
        (name.title() if titled else name, value) for name, values in headers.items() for value in values.split("\n")
    ]


def raw_reply(reply: HTTPReply, method: str = "") -> bytes:
    """Return an answer as its bytes in HTTP."""
    lines = [f"HTTP/1.1 {reply.status} {_one_line(reply.reason)}"]
    lines += [f"{name}: {_one_line(value)}" for name, value in headers_of(reply, method, titled=True)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + (b"" if method == "HEAD" else reply.body)


def _one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


def from_reply(reply: HTTPReply) -> dict[str, Any]:
    """Return our reply as vcrpy's response."""
    headers: dict[str, list[str]] = {}
    for name, value in headers_of(reply):
        headers.setdefault(name, []).append(value)
    return {
        "status": {"code": reply.status, "message": reply.reason},
        "headers": headers,
        "body": {"string": reply.body},
    }


_MODULES: Mapping[str, Any] = {"builtins": builtins, "socket": socket, "ssl": ssl, "http.client": http.client}
_ERRNO = re.compile(r"\[Errno (-?\d+)\] (.*)", re.DOTALL)


def kind_of(error: BaseException, module: str = "") -> str:
    """Return the recorded name of a failure: the nearest class that is public in its `module`.

    >>> kind_of(ConnectionRefusedError(111, "refused")), kind_of(socket.gaierror(-2, "unknown"))
    ('builtins.ConnectionRefusedError', 'socket.gaierror')
    """
    for kind in type(error).__mro__:
        home = kind.__module__
        if module and (home == module or home.startswith(f"{module}.")):
            return f"{module}.{kind.__name__}"
        if home in _MODULES and getattr(_MODULES[home], kind.__name__, None) is kind:
            return f"{home}.{kind.__name__}"
    return "builtins.OSError"


def standard_error(kind: str, message: str) -> Exception:
    """Return a recorded failure as the standard library's exception; for another client's, the nearest one.

    >>> standard_error("builtins.ConnectionRefusedError", "[Errno 111] Connection refused").errno
    111
    >>> standard_error("httpx.ReadTimeout", "timed out")
    TimeoutError('timed out')
    """
    home, _, name = kind.rpartition(".")
    cls = getattr(_MODULES.get(home), name, None)
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        cls = TimeoutError if "timeout" in kind.lower() else ConnectionError
    if issubclass(cls, OSError) and (match := _ERRNO.fullmatch(message)):
        return cls(int(match[1]), match[2])
    return http.client.IncompleteRead(b"") if cls is http.client.IncompleteRead else cls(message)
