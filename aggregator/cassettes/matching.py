"""Which requests are the same: by method, address and canonical body, or by what a user says.

A *key function* turns a request into bytes; requests of one key are the same, and are found in one step. A *matcher*
compares two requests, as vcrpy's do; a tape then goes through the exchanges of the lineage one by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from aggregator.cassettes.hooks import BeforeRequest, VCRRequest, hook_request
from aggregator.cassettes.keys import Ignore, KeyOf, canonical, canonical_url, ignoring, key_of_request
from aggregator.errors import ConfigError
from aggregator.records import HTTPRequest

Matcher = Callable[[Any, Any], object]
"""Compares two requests in vcrpy's shape, the one that is asked and a recorded one. False, or an AssertionError, says
that they differ."""

MatchOn = KeyOf | Sequence[str | Matcher] | None
"""A key function, or vcrpy's names of parts and matchers."""


_DEFAULT_PORTS = {"http": "80", "https": "443"}


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
"""What `match_on` may name. Headers are not among them: a recording holds only some."""


class Matching(Struct, frozen=True):
    """How requests are compared: a key function, None for the usual key, and matchers that compare pairs."""

    key_of: KeyOf | None = None
    matchers: tuple[Matcher, ...] = ()
    is_looser: bool = False  # requests may match that differ in more than what is ignored

    def same(self, asked: HTTPRequest, recorded: HTTPRequest) -> bool:
        """Return True if no matcher tells two requests of one key apart."""
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
        return b"" if given is None else key_of(given)  # no request that is asked has this key

    return Matching(key_of=key_of_hooked, matchers=matching.matchers, is_looser=matching.is_looser)


def matching_by(match_on: MatchOn, ignore: Ignore = ()) -> Matching:
    """Return how a tape matches; raises ConfigError for a part that no recording holds.

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
