"""What a request asks: the sha256 of method, absolute URL and canonical body.

Two JSON bodies that differ only in the order of keys or in white space ask the same; 1 and 1.0 do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec

from aggregator.errors import ConfigError
from aggregator.records import HTTPRequest
from aggregator.text import canonical_json

if TYPE_CHECKING:
    from hashlib import _Hash

decode_json = msgspec.json.Decoder().decode

Ignore = tuple[tuple[str, ...], ...]
"""JSON paths that do not count, each as its parts; `*` stands for every item of a list."""


def parse_ignore(paths: Sequence[str]) -> Ignore:
    """Split dotted JSON paths.

    >>> parse_ignore(["user", "messages.*.id"])
    (('user',), ('messages', '*', 'id'))
    """
    if isinstance(paths, str):
        raise ConfigError(f"expected ignore as a list of JSON paths, got {paths!r}; give [{paths!r}]")
    return tuple(tuple(path.split(".")) for path in paths)


def canonical(body: bytes, ignore: Ignore = ()) -> bytes:
    """Return the body with JSON keys in order and no white space; a body that is not JSON as it is.

    >>> canonical(b'{"b": 1, "a": [1.0]}')
    b'{"a":[1.0],"b":1}'
    >>> canonical(b"q=1&p=2")
    b'q=1&p=2'
    """
    try:
        value = decode_json(body)
        for path in ignore:
            _remove(value, path)
        return canonical_json(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body


def _remove(value: Any, path: tuple[str, ...]) -> None:
    """Delete what the path names, in place; a path that is absent is no error."""
    head, rest = path[0], path[1:]
    if isinstance(value, list):
        for item in value if head == "*" else ():
            if rest:
                _remove(item, rest)
    elif isinstance(value, dict) and head in value:
        if rest:
            _remove(value[head], rest)
        else:
            del value[head]


def raw_key(method: str, url: str, body: bytes) -> bytes:
    """Return the digest of exactly these bytes: a shortcut to the canonical key of a body seen before."""
    digest = _begun(method, url).copy()
    digest.update(body)
    return digest.digest()


@lru_cache(maxsize=256)
def _begun(method: str, url: str) -> _Hash:
    """Return the digest so far, before the body; to be copied, never updated."""
    return sha256(f"{method} {url}\n".encode())


def request_key(method: str, url: str, body: bytes, ignore: Ignore = ()) -> bytes:
    """Return the digest by which a recorded request is found again.

    >>> request_key("POST", "https://x/", b'{"a":1,"b":2}') == request_key("POST", "https://x/", b'{"b":2, "a":1}')
    True
    """
    return raw_key(method, url, canonical(body, ignore))


KeyOf = Callable[[HTTPRequest], bytes]
"""A function from a redacted request to its key: requests of one key are equal."""


def key_of_request(request: HTTPRequest) -> bytes:
    """Return the key of a request by its method, URL and canonical body."""
    return request_key(request.method, request.url, request.body)


def ignoring(paths: Ignore) -> KeyOf | None:
    """Return the key function that leaves JSON paths of the body out; None for no paths, which is `key_of_request`."""
    return (lambda request: request_key(request.method, request.url, request.body, paths)) if paths else None
