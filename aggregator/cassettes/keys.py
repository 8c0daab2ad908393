"""What a request asks: the sha256 of method, absolute URL and canonical body.

Two JSON bodies that differ only in the order of keys or in white space ask the same; 1 and 1.0 do not. Two multipart
bodies ask the same if their parts do, whatever their boundary; two forms if they hold the same fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode

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
        raise ConfigError(f"Expected ignore as a list of JSON paths, got {paths!r}; give [{paths!r}]")
    return tuple(tuple(path.split(".")) for path in paths)


_BOUNDARY = re.compile(rb"--([^\r\n]{1,200}?)(--)?[ \t]*(?:\r\n|\Z)")
_DISPOSITION = re.compile(r"""\b(name|filename\*?)=(?:"((?:[^"\\]|\\.)*)"|([^;\s]+))""", re.IGNORECASE)
_FORM = "application/x-www-form-urlencoded"


def canonical(body: bytes, ignore: Ignore = (), content_type: str = "") -> bytes:
    """Return the body in a form that is the same for every body that asks the same.

    JSON has its keys in order and no white space. A multipart body is a JSON list of its parts: name, filename, content
    type and digest of the content, in the order in which they stand. A form, which only its `content_type` tells from
    text, has its fields in order of their names. Any other body stays as it is.

    >>> canonical(b'{"b": 1, "a": [1.0]}')
    b'{"a":[1.0],"b":1}'
    >>> canonical(b"q=1+1&p=2"), canonical(b"q=1%201&p=2", (), "application/x-www-form-urlencoded")
    (b'q=1+1&p=2', b'p=2&q=1+1')
    """
    if body.startswith(b"--") and (parts := _parts(body)) is not None:
        return canonical_json([_part(part, ignore) for part in parts])
    try:
        value = decode_json(body)
        for path in ignore:
            _remove(value, path)
        return canonical_json(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if not content_type.lower().startswith(_FORM):  # which urllib says of any body
            return body
        fields = parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding="latin-1")  # which loses no byte
        return urlencode(sorted(fields, key=lambda field: field[0]), encoding="latin-1").encode()


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


def _parts(body: bytes) -> list[bytes] | None:
    """Return the parts of a multipart body, headers included; None for a body that is none."""
    first = _BOUNDARY.match(body)
    if first is None:
        return None
    if first[2] and not body[first.end() :].strip():  # closed at once
        return []
    mark = b"\r\n--" + first[1] + (first[2] or b"")
    parts = (b"\r\n" + body[first.end() :]).split(mark)
    if not parts[-1].startswith(b"--"):
        return None
    return [part[2:] for part in parts[:-1]]


def _part(part: bytes, ignore: Ignore) -> list[str]:
    """Return what a part of a multipart body asks: name, filename, content type and the digest of its content."""
    if part.startswith(b"\r\n"):  # no headers
        head, content = "", part[2:]
    else:
        given, _, content = part.partition(b"\r\n\r\n")
        head = given.decode("utf-8", "replace")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n"))
    }
    named = {
        name.lower(): quoted or plain
        for name, quoted, plain in _DISPOSITION.findall(headers.get("content-disposition", ""))
    }
    kind = headers.get("content-type", "")
    digest = sha256(canonical(content, ignore, kind)).hexdigest()
    return [
        named.get("name", ""),
        named.get("filename", named.get("filename*", "")),
        kind.lower().partition(";")[0],
        digest,
    ]


def raw_key(method: str, url: str, body: bytes) -> bytes:
    """Return the digest of exactly these bytes: a shortcut to the canonical key of a body seen before."""
    digest = _begun(method, url).copy()
    digest.update(body)
    return digest.digest()


@lru_cache(maxsize=256)
def _begun(method: str, url: str) -> _Hash:
    """Return the digest so far, before the body; to be copied, never updated."""
    return sha256(f"{method} {url}\n".encode())


_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


@lru_cache(maxsize=1024)
def canonical_url(url: str) -> str:
    """Return an address in a form that is the same for every address that means the same.

    Scheme and host are in lower case, the scheme's own port and the fragment are left out, an empty path is `/`, the
    parameters are in order of their names (several of one name keep theirs), and letters are encoded only if they must.

    >>> canonical_url("HTTPS://API.example.com:443?b=x+y&a=%7e1#top")
    'https://api.example.com/?a=~1&b=x%20y'
    """
    scheme, mark, rest = url.partition("#")[0].partition("://")
    if not mark:
        return url
    head, _, query = rest.partition("?")
    place, _, path = head.partition("/")
    user, at, host = place.rpartition("@")
    scheme = scheme.lower()
    host = host.lower().removesuffix(_DEFAULT_PORTS.get(scheme, "://"))
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    named = [(_encode(name.replace("+", "%20")), _encode(value.replace("+", "%20"))) for name, _, value in pairs]
    parameters = "&".join(f"{name}={value}" for name, value in sorted(named, key=lambda pair: pair[0]))
    path = "/".join(map(_encode, path.split("/")))
    return "".join((scheme, mark, user, at, host, "/", path, "?" if parameters else "", parameters))


def _encode(text: str) -> str:
    """Return a segment of a path, a name or a value of a query, with all encoded that can be and nothing else."""
    return text if _UNRESERVED.issuperset(text) else quote(unquote_to_bytes(text), safe="")


def request_key(method: str, url: str, body: bytes, ignore: Ignore = (), content_type: str = "") -> bytes:
    """Return the digest by which a recorded request is found again.

    >>> request_key("POST", "https://x/", b'{"a":1,"b":2}') == request_key("POST", "https://x/", b'{"b":2, "a":1}')
    True
    """
    return raw_key(method, canonical_url(url), canonical(body, ignore, content_type))


KeyOf = Callable[[HTTPRequest], bytes]
"""A function from a redacted request to its key: requests of one key are equal."""


def key_of_request(request: HTTPRequest) -> bytes:
    """Return the key of a request by its method, URL and canonical body."""
    return _key(request, ())


def _key(request: HTTPRequest, ignore: Ignore) -> bytes:
    kind = next((value for name, value in request.headers.items() if name.lower() == "content-type"), "")
    return request_key(request.method, request.url, request.body, ignore, kind)


def ignoring(paths: Ignore) -> KeyOf | None:
    """Return the key function that leaves JSON paths of the body out; None for no paths, which is `key_of_request`."""
    return (lambda request: _key(request, paths)) if paths else None
