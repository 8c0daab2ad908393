"""Scripted answers of a chat completions server, shared by the tests of our client inside frameworks."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from aggregator import LLM
from aggregator.records import HTTPReply
from aggregator.testing import FakeTransport


def client(*steps: Any) -> tuple[LLM, FakeTransport]:
    transport = FakeTransport(*steps)
    return LLM("openai/gpt-4o-mini", api_key="none", transport=transport), transport


def tool_reply(name: str, arguments: Any, call: str = "call-1") -> HTTPReply:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    called = [{"id": call, "type": "function", "function": {"name": name, "arguments": text}}]
    message = {"role": "assistant", "content": None, "tool_calls": called}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    body = {"id": "chatcmpl-2", "model": "gpt-4o-mini", "choices": [choice], "usage": usage}
    return HTTPReply(status=200, body=msgspec.json.encode(body), headers={})


def tool_stream(name: str, arguments: str) -> HTTPReply:
    """Return a streamed tool call with its arguments in two chunks."""
    half = len(arguments) // 2
    first = {"index": 0, "id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments[:half]}}
    second = {"index": 0, "function": {"arguments": arguments[half:]}}
    choices: list[dict[str, Any]] = [{"index": 0, "delta": {"tool_calls": [one]}} for one in (first, second)]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    events: list[dict[str, Any]] = [{"id": "c", "model": "gpt-4o-mini", "choices": [choice]} for choice in choices]
    events.append(
        {"id": "c", "model": "gpt-4o-mini", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
    )
    body = "".join([*(f"data: {json.dumps(event)}\n\n" for event in events), "data: [DONE]\n\n"])
    return HTTPReply(status=200, body=body.encode(), headers={"content-type": "text/event-stream"})
