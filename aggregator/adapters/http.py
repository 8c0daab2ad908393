"""Agents at an address, in any language: each run is one POST of the request that `external.py` describes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from random import random
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from aggregator.adapters.external import (
    ExternalAgent,
    ExternalError,
    ReplyForm,
    Turn,
    as_parameters,
    encode_request,
    end_of,
)
from aggregator.errors import (
    APITimeoutError,
    AuthenticationError,
    ConfigError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)
from aggregator.guides.calling import Call
from aggregator.llm.retry import RetryPolicy
from aggregator.llm.transport import shared_transport
from aggregator.protocols import Transport
from aggregator.records import HTTPRequest

_FINAL = {401: AuthenticationError, 403: PermissionDeniedError, 404: NotFoundError, 405: NotFoundError}
_LOST = {429: RateLimitError, 502: ServerError, 503: ServerError, 504: ServerError}


class HTTPAgent(ExternalAgent):
    """An agent at an address: each run is one POST of JSON.

    `headers` are sent with each request. A lost connection, and 429, 502, 503 or 504, is retried by `retry`, and is
    then a lost call, not the agent's failure; 401, 403, 404 and 405 end the run. Any other status is the agent's
    failure, with the end of the body. `timeout` is in seconds, for one run. Raises ConfigError for an address that is
    not http or https.

    >>> HTTPAgent("http://127.0.0.1:8000/run", {"prompt": "Answer briefly."})
    <HTTPAgent with parameters prompt>
    """

    def __init__(
        self,
        url: str,
        values: Mapping[str, Any],
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
        reply: ReplyForm = "json",
        timeout: float = 120.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        transport: Transport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"Expected an address as in http://127.0.0.1:8000/run, got {url!r} - at HTTPAgent.url")
        self.headers = dict(headers)
        self.retry = retry
        self.transport = transport or shared_transport()
        remedy = "give them by name, as in HTTPAgent(url, {'prompt': 'Answer briefly.'})"
        super().__init__(url, as_parameters(values), reply=reply, timeout=timeout, remedy=remedy)

    def like(self, program: str) -> HTTPAgent:
        """Return this agent at another address."""
        values = {name: one.data for name, one in self._parameters.items()}
        options: Any = {"reply": self.reply, "timeout": self.timeout, "retry": self.retry, "transport": self.transport}
        return HTTPAgent(program, values, headers=self.headers, **options)

    async def ask(self, request: Mapping[str, Any], call: Call) -> bytes:
        """Post the request."""
        headers = {"content-type": "application/json", **self.headers}
        sent = HTTPRequest(url=self.program, body=encode_request(request), headers=headers)
        turn, deadline, attempt = Turn(sent), time.monotonic() + self.timeout, 1
        while True:
            remaining = max(0.0, deadline - time.monotonic())
            try:
                return await self._once(turn, sent, remaining)
            except LLMError as error:
                wait = self.retry.delay(error, attempt, remaining=remaining, random=random())  # noqa: S311
                if wait is None:
                    raise
            attempt += 1
            await asyncio.sleep(0 if turn.is_replayed else wait)

    async def _once(self, turn: Turn, request: HTTPRequest, timeout: float) -> bytes:
        try:
            reply = await turn.reply_to(lambda: self.transport.send(request, timeout=timeout))
        except APITimeoutError:
            raise ExternalError(f"Expected a reply within {self.timeout:g} s, got none; raise timeout=") from None
        if 200 <= reply.status < 300:
            return reply.body
        got, end = f"Expected status 200 of the agent's server, got {reply.status}", end_of(reply.body)
        kind = _FINAL.get(reply.status) or _LOST.get(reply.status)
        if kind is not None:
            retry_after = reply.headers.get("retry-after", "")
            after = float(retry_after) if retry_after.isdigit() else None
            raise kind(f"{got}: {end}", status=reply.status, retry_after=after)
        raise ExternalError(f"{got}: {end}")
