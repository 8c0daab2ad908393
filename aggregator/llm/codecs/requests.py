"""What every codec's request has in common: headers, key, deterministic bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from aggregator import __version__
from aggregator.llm.calls import Target
from aggregator.records import HTTPRequest

# Only what can be decoded everywhere: eight recorded exchanges came as brotli to clients that could not read it.
ACCEPT_ENCODING = "gzip, deflate"
_USER_AGENT = f"aggregator/{__version__}"
_to_json = msgspec.json.Encoder().encode


def api_key(target: Target) -> str | None:
    """The key of the moment."""
    return target.api_key() if callable(target.api_key) else target.api_key


def secrets(target: Target) -> tuple[str, ...]:
    """The very values that authenticate, which no message and no file may hold."""
    key = api_key(target)
    return (key,) if key else ()


def post(target: Target, url: str, body: Mapping[str, Any], *, stream: bool = False) -> HTTPRequest:
    """Build the request. The body keeps the order of its keys: the same call gives the same bytes."""
    headers = {
        "content-type": "application/json",
        "accept": "text/event-stream" if stream else "application/json",
        "accept-encoding": ACCEPT_ENCODING,
        "user-agent": _USER_AGENT,
        **target.headers,
    }
    key = api_key(target)
    if key:
        headers[target.auth] = f"Bearer {key}" if target.auth == "authorization" else key
    return HTTPRequest(url=url, body=_to_json(body), headers=headers, secrets=(key,) if key else ())
