"""Requests are sent to the simulated model's port under a fixed address."""

from __future__ import annotations

import pytest

from aggregator.demo.run import SIMULATED_URL, Rerouted
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest


class Seen(Transport):
    def __init__(self) -> None:
        self.urls: list[str] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.urls.append(request.url)
        return HTTPReply(status=200, body=b"", headers={})


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        (f"{SIMULATED_URL}/chat/completions", "http://127.0.0.1:9/v1/chat/completions"),
        ("https://api.example/v1/chat", "https://api.example/v1/chat"),
    ],
)
async def test_only_the_fixed_address_is_rerouted(url: str, sent: str) -> None:
    """The path is kept, the authority changes, and other addresses are not changed."""
    seen = Seen()
    route = Rerouted(seen, source=SIMULATED_URL, target="http://127.0.0.1:9/v1")
    request = HTTPRequest(url=url, body=b"{}", headers={})
    await route.send(request)
    assert (seen.urls, request.url) == ([sent], url)
