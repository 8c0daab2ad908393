"""What every codec's request has in common: headers, key, deterministic bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from aggregator import __version__
from aggregator.llm.calls import Target
from aggregator.records import HTTPRequest

# Only what can be decoded everywhere: eight recorded exchanges came as brotli to clients that could not read it.
ACCEPT_ENCODING = "gzip, deflate"
_USER_AGENT = f"aggregator/{__version__}"
_to_json = msgspec.json.Encoder().encode


class Envelope:
    """Makes the requests of one target; headers are built once, unless the key is a function."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._fixed = None if callable(target.api_key) else self._dressed(target.api_key)

    def post(self, url: str, body: Mapping[str, Any] | Struct, *, stream: bool = False) -> HTTPRequest:
        """Build a request. The body keeps the order of its keys: the same call gives the same bytes."""
        plain, streamed, secrets = self._fixed or self._dressed(api_key(self._target))
        return HTTPRequest(url=url, body=_to_json(body), headers=streamed if stream else plain, secrets=secrets)

    def _dressed(self, key: str | None) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
        """The headers of a plain and of a streamed request, and the secrets in them."""
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": ACCEPT_ENCODING,
            "user-agent": _USER_AGENT,
            **self._target.headers,
        }
        if key:
            headers[self._target.auth] = f"Bearer {key}" if self._target.auth == "authorization" else key
        return headers, {**headers, "accept": "text/event-stream"}, (key,) if key else ()


def api_key(target: Target) -> str | None:
    """The key of the moment."""
    return target.api_key() if callable(target.api_key) else target.api_key


def secrets(target: Target) -> tuple[str, ...]:
    """The very values that authenticate, which no message and no file may hold."""
    key = api_key(target)
    return (key,) if key else ()
