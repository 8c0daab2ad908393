"""Where the demo's requests go: to a fixed address on paper, to the simulated model's port on the wire.

The cassette holds the fixed address, so that a recording does not depend on the port that happened to be free.
"""

from __future__ import annotations

from msgspec.structs import replace

from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest

SIMULATED_URL = "http://simulated-model.invalid/v1"
"""No such host can exist (RFC 2606); requests to it only leave through `Rerouted`."""


class Rerouted(Transport):
    """A transport that sends requests for one address to another."""

    def __init__(self, inner: Transport, *, source: str, target: str) -> None:
        self._inner = inner
        self._source = source
        self._target = target

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        """Send one request to where its address leads."""
        if request.url.startswith(self._source):
            request = replace(request, url=self._target + request.url.removeprefix(self._source))
        return await self._inner.send(request, timeout=timeout)
