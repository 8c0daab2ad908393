"""Fakes for your own tests: a transport for `LLM`, and a model.

`FakeTransport` answers the client's HTTP requests, so everything above it runs as with a provider: encoding, retries,
limits, budgets, cassettes. `ScriptedModel` replaces the whole client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable
from typing import Any

import msgspec

from aggregator.cassettes.lineage import current_lineage, current_role
from aggregator.errors import ConfigError
from aggregator.llm.ledger import Price
from aggregator.llm.models import CallableModel
from aggregator.protocols import Transport
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, Usage
from aggregator.text import shorten, show_count


def text_reply(
    text: str = "hello",
    *,
    finish_reason: str = "stop",
    usage: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] = {},
) -> HTTPReply:
    """Return a chat completion in OpenAI's format; its usage is 10 tokens in and 5 out by default."""
    counts = {"prompt_tokens": 10, "completion_tokens": 5} if usage is None else usage
    body = {
        "id": "chatcmpl-1",
        "model": "gpt-4o-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": counts,
    }
    return HTTPReply(status=200, body=msgspec.json.encode(body), headers={"x-request-id": "req-1", **headers})


def error_reply(
    status: int, message: str = "no", *, code: str | None = None, headers: Mapping[str, str] = {}
) -> HTTPReply:
    """Return an error in OpenAI's format, such as `error_reply(429, headers={"retry-after": "2"})`."""
    body = {"error": {"message": message, "code": code}}
    return HTTPReply(status=status, body=msgspec.json.encode(body), headers=dict(headers))


def stream_reply(*pieces: str, usage: Mapping[str, Any] | None = None) -> HTTPReply:
    """Return a streamed chat completion in OpenAI's format, one event for each piece of the text."""
    counts = {"prompt_tokens": 10, "completion_tokens": 5} if usage is None else usage
    deltas: list[dict[str, Any]] = [{"index": 0, "delta": {"role": "assistant", "content": text}} for text in pieces]
    deltas.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    events: list[dict[str, Any]] = [{"id": "chatcmpl-1", "model": "gpt-4o-mini", "choices": [one]} for one in deltas]
    events.append({"id": "chatcmpl-1", "model": "gpt-4o-mini", "choices": [], "usage": counts})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    body = "".join([*lines, "data: [DONE]\n\n"]).encode()
    return HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})


Step = HTTPReply | str | Exception | Callable[[HTTPRequest], Any]


class FakeTransport(Transport):
    """Answers requests from a script, one step after the other; the last step is repeated.

    A step is an HTTPReply, a text (sent as by `text_reply`), an exception (raised), or a function of the request that
    returns one of these, sync or async. `requests` and `timeouts` record the requests. `latency` is awaited before each
    answer.

    >>> from aggregator import LLM
    >>> transport = FakeTransport(error_reply(429, headers={"retry-after": "0"}), "hello")
    >>> llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport)
    >>> llm(messages="Hi").text, len(transport.requests)
    ('hello', 2)
    """

    def __init__(self, *steps: Step, latency: Callable[[], Awaitable[None]] | None = None) -> None:
        if not steps:
            raise ConfigError("Expected at least one step, as in FakeTransport('hello'), got none")
        self.steps = list(steps)
        self.requests: list[HTTPRequest] = []
        self.timeouts: list[float | None] = []
        self._latency = latency

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        """Answer with the next step; raises ConfigError if it is not one."""
        self.requests.append(request)
        self.timeouts.append(timeout)
        step = self.steps[min(len(self.requests), len(self.steps)) - 1]
        if self._latency is not None:
            await self._latency()
        answer = await _answer(step, request)
        if isinstance(answer, HTTPReply):
            return answer
        if isinstance(answer, str):
            return text_reply(answer)
        raise ConfigError(f"Expected an HTTPReply, a text or an exception from the script, got {shorten(answer)}")

    def bodies(self) -> list[Any]:
        """Return the decoded JSON body of each request."""
        return [msgspec.json.decode(request.body) for request in self.requests]

    def __repr__(self) -> str:
        return f"<FakeTransport: {show_count(len(self.steps), 'step')}, {show_count(len(self.requests), 'request')}>"


Reply = str | Mapping[str, Any] | Completion | Exception | Callable[[list[dict[str, Any]]], Any]


ONE_CALL = Usage(input_tokens=10, output_tokens=5, cost=0.1)
"""The default usage of a ScriptedModel's call: enough to test costs and budgets."""


class ScriptedModel(CallableModel):
    """A model that answers from a script, one reply after the other; the last reply is repeated.

    A reply is a text, a mapping (sent as JSON), a Completion, an exception (raised), or a function of the messages that
    returns one of these, sync or async. Each call counts `usage` in ledgers and budgets. `asked`, `options` and
    `places` record the messages, the options, and the (lineage, role) of each call. `jitter` returns the number of
    event loop iterations that a call waits, to shuffle the order of completion.

    >>> model = ScriptedModel("first", "again")
    >>> [model(messages="Hi").text for _ in range(3)], len(model.asked)
    (['first', 'again', 'again'], 3)
    """

    def __init__(
        self,
        *replies: Reply,
        jitter: Callable[[], int] = lambda: 0,
        usage: Usage = ONE_CALL,
    ) -> None:
        if not replies:
            raise ConfigError("Expected at least one reply, as in ScriptedModel('hello'), got none")
        super().__init__(self._reply, name="scripted", prices={"scripted": Price(input=0.0, output=0.0)})
        self.replies = list(replies)
        self.jitter = jitter
        self.usage = usage
        self.asked: list[list[dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []
        self.places: list[tuple[str, str]] = []

    async def complete(self, messages: Any, **options: Any) -> Completion:
        """Answer with the next reply."""
        self.asked.append(messages)
        self.options.append(options)
        self.places.append((current_lineage(), current_role()))
        return await super().complete(messages, **options)

    async def _reply(self, messages: list[dict[str, Any]], **options: Any) -> Completion:
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        for _ in range(self.jitter()):
            await asyncio.sleep(0)
        answer = await _answer(reply, messages)
        if isinstance(answer, Completion):
            return answer
        text = answer if answer is None or isinstance(answer, str) else json.dumps(answer)
        return Completion(choices=(Choice(message=Message(content=text)),), usage=self.usage)

    def __repr__(self) -> str:
        return f"<ScriptedModel: {show_count(len(self.asked), 'call')}>"


def suggestion(reasoning: str = "because", /, **values: Any) -> str:
    """Return a reply of an optimizer or aggregator that suggests these values, for `ScriptedModel`.

    >>> suggestion(k=3)
    '{"reasoning_all": "because", "suggestion": {"k": 3}}'
    """
    return json.dumps({"reasoning_all": reasoning, "suggestion": values})


async def _answer(step: Any, asked: Any) -> Any:
    """Return the answer of a script's step; raises it if it is an exception."""
    answer = step(asked) if callable(step) else step
    if isawaitable(answer):
        answer = await answer
    if isinstance(answer, Exception):
        raise answer
    return answer
