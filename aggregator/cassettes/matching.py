"""Which requests are equal: by default those with one method, address and canonical body.

Two JSON bodies are equal if they differ only in the order of keys or in white space; 1 and 1.0 are not equal. Two
multipart bodies are equal if their parts are, whatever their boundary; two forms if they hold the same fields.

A *key function* turns a request into bytes; requests with one key are equal, and are found in one step. A *matcher*
compares two requests, as vcrpy's do; a tape then goes through the exchanges of the lineage one by one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlencode, urlsplit

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.cassettes.credentials import authenticating_values
from aggregator.cassettes.payloads import LARGEST_INFLATED, inflated
from aggregator.errors import ConfigError
from aggregator.records import HTTPReply, HTTPRequest
from aggregator.text import canonical_json

if TYPE_CHECKING:
    from hashlib import _Hash


# Keys

decode_json = msgspec.json.Decoder().decode

Ignore = tuple[tuple[str, ...], ...]
"""Ignored JSON paths, each as its parts; `*` matches every item of a list."""


# ---- canonical bodies and addresses


def parse_ignore(paths: Sequence[str]) -> Ignore:
    """Split dotted JSON paths.

    >>> parse_ignore(["user", "messages.*.id"])
    (('user',), ('messages', '*', 'id'))
    """
    if isinstance(paths, str):
        raise ConfigError(f"Expected ignore as a list of JSON paths, got {paths!r}; give [{paths!r}]")
    return tuple(tuple(path.split(".")) for path in paths)


_FIRST_LINE = re.compile(rb"--([^\r\n]{1,200}?)(--)?[ \t]*(?:\r?\n|\Z)")
_BOUNDARY = re.compile(r'^multipart/[^;]*;(?:.*;)?\s*boundary="?([^";]+)', re.IGNORECASE | re.DOTALL)
_HEADERS_END = re.compile(rb"\r?\n\r?\n")
_DISPOSITION = re.compile(r"""\b(name|filename\*?)=(?:"((?:[^"\\]|\\.)*)"|([^;\s]+))""", re.IGNORECASE)
_GZIP = b"\x1f\x8b"
_FORM = "application/x-www-form-urlencoded"


def canonical(body: bytes, ignore: Ignore = (), content_type: str = "") -> bytes:
    """Return the body in a form that all equal bodies share.

    JSON has its keys in order and no white space. A multipart body is a JSON list of its parts: name, filename, content
    type and digest of the content, in their order. A form, which only its `content_type` distinguishes from text, has
    its fields in order of their names. A gzip body is that of its content. Any other body stays as it is.

    >>> canonical(b'{"b": 1, "a": [1.0]}')
    b'{"a":[1.0],"b":1}'
    >>> canonical(b"q=1+1&p=2"), canonical(b"q=1%201&p=2", (), "application/x-www-form-urlencoded")
    (b'q=1+1&p=2', b'p=2&q=1+1')
    """
    named = _BOUNDARY.match(content_type)
    if (named or body.startswith(b"--")) and (parts := _parts(body, named[1].encode() if named else b"")) is not None:
        return canonical_json([_part(part, ignore) for part in parts])
    try:
        value = decode_json(body)
        for path in ignore:
            _remove(value, path)
        return canonical_json(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if body.startswith(_GZIP) and 0 < len(plain := inflated(body)) < LARGEST_INFLATED:
            return canonical(plain, ignore, content_type)  # gzip writes the time
        if not content_type.lower().startswith(_FORM):  # which urllib sends with any body
            return body
        fields = parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding="latin-1")  # which loses no byte
        return urlencode(sorted(fields, key=lambda field: field[0]), encoding="latin-1").encode()


def _remove(value: Any, path: tuple[str, ...]) -> None:
    """Delete what the path names, in place; an absent path is not an error."""
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


def _parts(body: bytes, boundary: bytes) -> list[bytes] | None:
    """Return the parts of a multipart body, headers included; None for any other body.

    Lines end in CRLF, or in LF alone as Python's `email` writes them. If no `boundary` is known it is the first line.
    """
    if not boundary or b"--" + boundary not in body:
        first = _FIRST_LINE.match(body)
        if first is None:
            return None
        if first[2] and not body[first.end() :].strip():  # closed at once
            return []
        boundary = first[1] + (first[2] or b"")
    marks = [
        mark
        for mark in re.finditer(re.escape(b"--" + boundary) + rb"(--)?[ \t]*(?=\r?\n|\Z)", body)
        if not mark.start() or body[mark.start() - 1] == 0x0A
    ]
    if not marks or not marks[-1][1]:
        return None
    parts = [body[mark.end() : after.start()] for mark, after in pairwise(marks)]
    return [part.removeprefix(b"\r").removeprefix(b"\n").removesuffix(b"\n").removesuffix(b"\r") for part in parts]


def _part(part: bytes, ignore: Ignore) -> list[str]:
    """Return the compared facts of a part of a multipart body: name, filename, content type, digest of its content."""
    if part.startswith((b"\r\n", b"\n")):  # no headers
        head, content = "", part.removeprefix(b"\r").removeprefix(b"\n")
    else:
        end = _HEADERS_END.search(part)
        head = part[: end.start() if end else None].decode("utf-8", "replace")
        content = part[end.end() :] if end else b""
    lines = re.sub(r"\r?\n[ \t]+", " ", head).splitlines()
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
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


# ---- keys


def raw_key(method: str, url: str, body: bytes) -> bytes:
    """Return the digest of exactly these bytes: a shortcut to the canonical key of a body seen before."""
    digest = _begun(method, url).copy()
    digest.update(body)
    return digest.digest()


@lru_cache(maxsize=256)
def _begun(method: str, url: str) -> _Hash:
    """Return the digest so far, before the body; to be copied, never updated."""
    return sha256(f"{method} {url}\n".encode())


_DEFAULT_PORTS = {"http": "80", "https": "443"}
_PORT = re.compile(r"(.*?)(:[0-9]*)?", re.DOTALL)
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


@lru_cache(maxsize=1024)
def canonical_url(url: str) -> str:
    """Return an address in a form that all equivalent addresses share.

    Scheme and host are in lower case, the host in Punycode, the scheme's own port and the fragment are left out, an
    empty path is `/`, the segments `.` and `..` of a path are resolved, the parameters are in order of their names
    (several of one name keep theirs), and letters are encoded only if they must.

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
    host, port = _PORT.fullmatch(host.lower()).groups("")  # type: ignore[union-attr] # it matches any text
    port = port.lstrip(":0")
    if port and port != _DEFAULT_PORTS.get(scheme):
        host = f"{host}:{port}"
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    named = [(_encode(name.replace("+", "%20")), _encode(value.replace("+", "%20"))) for name, _, value in pairs]
    parameters = "&".join(f"{name}={value}" for name, value in sorted(named, key=lambda pair: pair[0]))
    segments = [*map(_encode, path.split("/"))]
    path = "/".join(_resolve(segments) if "." in segments or ".." in segments else segments)
    if not host.isascii():
        with suppress(UnicodeError):
            host = host.encode("idna").decode()
    return "".join((scheme, mark, user, at, host, "/", path, "?" if parameters else "", parameters))


def _resolve(segments: Sequence[str]) -> list[str]:
    """Return the segments of a path without `.` and `..`."""
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return [*kept, ""] if segments[-1] in (".", "..") else kept


def _encode(text: str) -> str:
    """Return a segment of a path, or a name or value of a query, with exactly those characters encoded that may be."""
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


# Hooks

BeforeRequest = Callable[[Any], Any]
"""Takes a request in vcrpy's shape and returns it, changed or not; None leaves the request to the network."""
BeforeResponse = Callable[[dict[str, Any]], Any]
"""Takes an answer in vcrpy's shape, a dict, and returns it, changed or not; None means that it is not recorded."""


# ---- requests and replies as vcrpy hooks see them


class Headers(MutableMapping[str, Any]):
    """Headers by names in any case; each keeps the case in which it was set."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given: dict[str, tuple[str, Any]] = {name.lower(): (name, value) for name, value in given.items()}

    def __getitem__(self, name: str) -> Any:
        return self._given[name.lower()][1]

    def __setitem__(self, name: str, value: Any) -> None:
        self._given[name.lower()] = (name, value)

    def __delitem__(self, name: str) -> None:
        del self._given[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in self._given.values()])

    def __len__(self) -> int:
        return len(self._given)


class VCRRequest:
    """A request as vcrpy's hooks and matchers know it; changes that they make are used."""

    def __init__(self, method: str, uri: str, body: bytes | str | None, headers: Mapping[str, Any]) -> None:
        self.method, self.uri, self.body = method, uri, body
        self.headers: Any = Headers(headers)

    @classmethod
    def of(cls, request: HTTPRequest) -> VCRRequest:
        """Make one of a request."""
        return cls(request.method, request.url, request.body, request.headers)

    @property
    def url(self) -> str:
        """The address."""
        return self.uri

    @property
    def scheme(self) -> str:
        """The scheme of the address."""
        return urlsplit(self.uri).scheme

    protocol = scheme

    @property
    def host(self) -> str | None:
        """The host of the address."""
        return urlsplit(self.uri).hostname

    @property
    def port(self) -> int | None:
        """The port of the address, also if it is the scheme's default."""
        parts = urlsplit(self.uri)
        return parts.port or {"https": 443, "http": 80}.get(parts.scheme)

    @property
    def path(self) -> str:
        """The path of the address."""
        return urlsplit(self.uri).path

    @property
    def query(self) -> list[tuple[str, str]]:
        """The parameters of the address, in order of their names."""
        return sorted(parse_qsl(urlsplit(self.uri).query))

    def __repr__(self) -> str:
        return f"<Request ({self.method}) {self.uri}>"


def hook_request(hook: BeforeRequest, request: HTTPRequest) -> HTTPRequest | None:
    """Return a hook's request; None to leave it out. The hook gets vcrpy's shape, and may return ours."""
    given = hook(VCRRequest.of(request))
    if given is None:
        return None
    secrets = tuple(sorted(authenticating_values(request.url, request.headers, request.secrets)))
    if isinstance(given, HTTPRequest):
        return replace(given, secrets=(*given.secrets, *secrets))
    try:
        body = given.body
        data = body.encode() if isinstance(body, str) else bytes(body or b"")
        headers = {str(name): _header(value) for name, value in given.headers.items()}
        return replace(request, method=given.method, url=given.uri, body=data, headers=headers, secrets=secrets)
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"Expected before_record_request to return a request, or None to leave it out, got {given!r} ({error})"
        ) from error


def _header(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_header, value))
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def hook_reply(hook: BeforeResponse, reply: HTTPReply) -> HTTPReply | None:
    """Return a hook's answer; None to leave it unrecorded. The hook gets vcrpy's shape, a dict."""
    given = hook(
        {
            "status": {"code": reply.status, "message": reply.reason},
            "headers": {name: value.split("\n") for name, value in reply.headers.items()},
            "body": {"string": reply.body},
        }
    )
    if given is None:
        return None
    if isinstance(given, HTTPReply):
        return given
    try:
        body = given["body"]["string"]
        data = body.encode() if isinstance(body, str) else bytes(body or b"")
        return replace(
            reply,
            status=int(given["status"]["code"]),
            reason=str(given["status"]["message"] or ""),
            headers={str(name).lower(): _header(value) for name, value in given["headers"].items()},
            body=data,
            chunks=reply.chunks if data == reply.body else (),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"Expected before_record_response to return an answer, or None to leave it out, got {given!r} ({error!r})"
        ) from error


# Options of a cassette

Matcher = Callable[[Any, Any], object]
"""Compares two requests in vcrpy's shape, the new one and a recorded one. False, or an AssertionError, means
that they differ."""

MatchOn = KeyOf | Sequence[str | Matcher] | None
"""A key function, or vcrpy's names of parts and matchers."""


def _query(url: str) -> str:
    return urlsplit(canonical_url(url)).query


def _port(url: str) -> str:
    parts = urlsplit(url)
    return str(parts.port or _DEFAULT_PORTS.get(parts.scheme.lower(), ""))


_PARTS: Mapping[str, Callable[[HTTPRequest], str]] = {
    "method": lambda request: request.method,
    "uri": lambda request: canonical_url(request.url),
    "url": lambda request: canonical_url(request.url),
    "scheme": lambda request: urlsplit(request.url).scheme.lower(),
    "host": lambda request: urlsplit(request.url).hostname or "",
    "port": lambda request: _port(request.url),
    "path": lambda request: urlsplit(canonical_url(request.url)).path,
    "query": lambda request: _query(request.url),
}
BODIES = ("body", "raw_body")
NAMES = (*_PARTS, *BODIES)
"""The names for `match_on`. Headers are not among them, since a recording has only some."""


# ---- matching by other fields


class Matching(Struct, frozen=True):
    """How requests are compared: a key function, None for the usual key, and matchers that compare pairs."""

    key_of: KeyOf | None = None
    matchers: tuple[Matcher, ...] = ()
    is_looser: bool = False  # requests may match that differ in more than the ignored parts

    def same(self, asked: HTTPRequest, recorded: HTTPRequest) -> bool:
        """Return True if no matcher finds a difference between two requests of one key."""
        one, other = VCRRequest.of(asked), VCRRequest.of(recorded)
        for matcher in self.matchers:
            try:
                if matcher(one, other) is False:
                    return False
            except AssertionError:
                return False
        return True


USUAL_MATCHING = Matching()


def hooked(matching: Matching, hook: BeforeRequest) -> Matching:
    """Return the matching for requests that a hook changes: recorded ones are changed before they are compared too."""
    key_of = matching.key_of or key_of_request

    def key_of_hooked(request: HTTPRequest) -> bytes:
        given = hook_request(hook, request)
        return b"" if given is None else key_of(given)  # no request of a call has this key

    return Matching(key_of=key_of_hooked, matchers=matching.matchers, is_looser=matching.is_looser)


def matching_by(match_on: MatchOn, ignore: Ignore = ()) -> Matching:
    """Return a tape's matching; raises ConfigError for a part that recordings do not have.

    >>> matching_by(["method", "path"]).key_of(HTTPRequest(url="http://a/b?c", body=b"1", headers={})) == matching_by(
    ...     ["method", "path"]).key_of(HTTPRequest(url="https://x/b", body=b"2", headers={}))
    True
    """
    if match_on is None:
        return Matching(key_of=ignoring(ignore))
    if callable(match_on):
        key_of = match_on
        return Matching(key_of=lambda request: _as_bytes(key_of(request)), is_looser=True)
    if isinstance(match_on, str):
        raise ConfigError(
            f"Expected match_on as a list of names, or a key function, got {match_on!r}; give [{match_on!r}]"
        )
    names = tuple(one for one in match_on if isinstance(one, str))
    matchers = tuple(one for one in match_on if callable(one))
    unknown = [one for one in match_on if not callable(one) and one not in NAMES]
    if unknown:
        raise ConfigError(
            f"Expected match_on to name parts of a request ({', '.join(NAMES)}) or to hold matchers, "
            f"got {unknown[0]!r}; for anything else give a key function (request -> bytes)"
        )
    for matcher in matchers:
        _check_matcher(matcher)
    return Matching(key_of=lambda request: _key_of_parts(request, names, ignore), matchers=matchers, is_looser=True)


def _check_matcher(matcher: Matcher) -> None:
    try:
        inspect.signature(matcher).bind(None, None)
    except TypeError:
        raise ConfigError(
            f"Expected matchers in match_on to take two requests, got {matcher!r}; give a key function without a list"
        ) from None
    except ValueError:  # a function without a signature
        return


def _as_bytes(key: Any) -> bytes:
    if isinstance(key, str):
        return key.encode()
    if not isinstance(key, bytes):
        raise ConfigError(f"Expected the key function of match_on to return bytes, got {key!r}")
    return key


def _key_of_parts(request: HTTPRequest, names: Sequence[str], ignore: Ignore) -> bytes:
    digest = sha256()
    for name in names:
        if name == "body":
            part = canonical(request.body, ignore, request.headers.get("content-type", ""))
        else:
            part = request.body if name == "raw_body" else _PARTS[name](request).encode()
        digest.update(b"%d " % len(part) + part)
    return digest.digest()
