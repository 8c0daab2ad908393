"""Other HTTP clients: which there are, and their requests and answers as our records. Pure; imports no client."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from aggregator.cassettes.compression import decompressed
from aggregator.errors import CassetteError, ConfigError
from aggregator.records import HTTPReply, HTTPRequest

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "aiohttp": ("aiohttp",),
    "boto3": ("boto3",),
    "http.client": ("httplib",),
    "httplib2": ("httplib2",),
    "httpx": ("httpx", "httpx2"),
    "tornado": ("tornado",),
    "urllib3": ("requests", "urllib3"),
}
"""Client -> vcrpy's names of the patches that serve it. No two clients share a patched attribute, so that each can
be switched on and off by itself."""

RIDES_ON: Mapping[str, tuple[str, ...]] = {
    "anthropic": ("httpx",),
    "google-genai": ("httpx",),
    "litellm": ("httpx", "aiohttp"),
    "openai": ("httpx",),
    "requests": ("urllib3",),
}
"""Library -> the clients below it."""

_REFRAMED = frozenset({"content-encoding", "content-length", "transfer-encoding"})


def families(clients: str | Iterable[str]) -> frozenset[str]:
    """Return the clients that "all" or a list of names stands for.

    >>> sorted(families(["openai", "requests"]))
    ['httpx', 'urllib3']
    """
    names = tuple(FAMILIES) if clients == "all" else (clients,) if isinstance(clients, str) else tuple(clients)
    unknown = [name for name in names if name not in FAMILIES and name not in RIDES_ON]
    if unknown:
        known = ", ".join(sorted({*FAMILIES, *RIDES_ON}))
        raise ConfigError(f'expected clients="all" or names of {known}; got {unknown[0]!r}')
    return frozenset(client for name in names for client in RIDES_ON.get(name, (name,)))


_PASSING: ContextVar[bool] = ContextVar("aggregator_passing", default=False)

is_passing = _PASSING.get
"""Return whether this context's requests are to go through the patches untouched."""


@contextmanager
def passing() -> Iterator[None]:
    """Let requests made inside go through untouched: whoever makes them has asked the tape already."""
    token = _PASSING.set(True)
    try:
        yield
    finally:
        _PASSING.reset(token)


class _Headers(Mapping[str, str]):
    """Another client's headers, converted when somebody looks: a replay seldom does."""

    __slots__ = ("_given", "_made")

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._made: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._made is None:
            self._made = {str(name): _header(value) for name, value in self._given.items()}
        return self._made

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def to_request(method: str, url: str, body: Any, headers: Mapping[str, Any]) -> HTTPRequest:
    """Return another client's request as ours; what authenticates it, the redaction finds in its headers and URL."""
    return HTTPRequest(
        method=method,
        url=url,
        body=body if type(body) is bytes else to_bytes(body, url),
        headers=_Headers(headers),
    )


def _header(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else str(value)


def to_bytes(body: Any, url: str) -> bytes:
    """Return a body as clients hand it over (aiohttp's `json=` is still an object then) as bytes.

    >>> to_bytes({"a": [1]}, "http://x/"), to_bytes(None, "http://x/"), to_bytes(iter([b"a", b"b"]), "http://x/")
    (b'{"a": [1]}', b'', b'ab')
    """
    if body is None or isinstance(body, bytes | bytearray | memoryview):
        return bytes(body or b"")
    if isinstance(body, str):
        return body.encode()
    if hasattr(body, "read"):
        return to_bytes(body.read(), url)
    try:
        if isinstance(body, Iterator):
            return b"".join(to_bytes(part, url) for part in body)
        return json.dumps(body).encode()
    except TypeError as error:
        raise CassetteError(
            f"expected a body of bytes, text, JSON or an iterator of them, got {type(body).__name__} - at {url}; "
            "a cassette cannot tell such a body from another: send bytes"
        ) from error


def to_reply(response: Mapping[str, Any], milliseconds: float = 0.0) -> HTTPReply:
    """Return vcrpy's response as ours: header names in lower case, the body decompressed."""
    headers = {name.lower(): ", ".join(map(_header, values)) for name, values in response["headers"].items()}
    body, coding = decompressed(response["body"].get("string") or b"", headers.get("content-encoding", ""))
    kept = {name: value for name, value in headers.items() if name not in _REFRAMED}
    return HTTPReply(
        status=response["status"]["code"],
        reason=response["status"]["message"] or "",
        headers=kept | ({"content-encoding": coding} if coding else {}),
        body=body,
        milliseconds=milliseconds,
    )


def from_reply(reply: HTTPReply) -> dict[str, Any]:
    """Return our reply as vcrpy's response, made anew each time because stubs change what they are given."""
    headers = {name: [value] for name, value in reply.headers.items() if name != "content-length"}
    headers["content-length"] = [str(len(reply.body))]
    return {
        "status": {"code": reply.status, "message": reply.reason},
        "headers": headers,
        "body": {"string": reply.body},
    }
