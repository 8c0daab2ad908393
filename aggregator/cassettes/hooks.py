"""vcrpy's hooks and matchers: requests and answers in the shapes that they know, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from msgspec.structs import replace

from aggregator.cassettes.credentials import authenticating_values
from aggregator.errors import ConfigError
from aggregator.records import HTTPReply, HTTPRequest

BeforeRequest = Callable[[Any], Any]
"""Takes a request in vcrpy's shape and returns it, changed or not; None leaves the request to the network."""
BeforeResponse = Callable[[dict[str, Any]], Any]
"""Takes an answer in vcrpy's shape, a dict, and returns it, changed or not; None leaves it unrecorded."""


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
    """A request as vcrpy's hooks and matchers know it; what they set counts."""

    def __init__(self, method: str, uri: str, body: bytes | str | None, headers: Mapping[str, Any]) -> None:
        self.method, self.uri, self.body = method, uri, body
        self.headers: Any = Headers(headers)

    @classmethod
    def of(cls, request: HTTPRequest) -> VCRRequest:
        """Return a request in this shape."""
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
        """The port of the address, also where it is the scheme's own."""
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
    """Return what a hook makes of a request; None to leave it out. The hook gets vcrpy's shape, and may return ours."""
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
    """Return what a hook makes of an answer; None to leave it unrecorded. The hook gets vcrpy's shape, a dict."""
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
