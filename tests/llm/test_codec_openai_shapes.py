"""The shapes of chat completions that servers send, and the same with any one field damaged."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from aggregator.errors import EmptyResponseError, LLMError, ServerError
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.openai import OpenAIChat
from aggregator.llm.names import resolve
from aggregator.records import HTTPReply

CALL = ChatCall(model="gpt-4o-mini", messages=({"role": "user", "content": "Hi"},))
TOOL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
DETAIL = {"type": "reasoning.text", "text": "two and two", "format": "unknown", "index": 0}
COUNTS = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def answer(message: Any, finish: Any = "stop", usage: Any = COUNTS, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "logprobs": None, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage, **more}


USUAL = {
    "OpenAI": answer(
        {"content": "Hi", "refusal": None, "annotations": []},
        usage={
            **COUNTS,
            "prompt_tokens_details": {"cached_tokens": 2, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 0},
        },
        service_tier="default",
        system_fingerprint=None,
    ),
    "a refusal": answer({"content": None, "refusal": "No."}),
    "tool calls": answer({"content": None, "tool_calls": [TOOL, {**TOOL, "id": "call_2"}]}, "tool_calls"),
    "no content, and no id of a tool call": answer({"tool_calls": [{"function": TOOL["function"]}]}, "tool_calls"),
    "vLLM's nulls": answer(
        {"content": "Hi", "tool_calls": [], "reasoning_content": None, "function_call": None, "refusal": None},
        usage={**COUNTS, "prompt_tokens_details": None},
    ),
    "DeepSeek": answer(
        {"content": "\n\n4", "reasoning_content": "two and two"},
        usage={**COUNTS, "prompt_cache_hit_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 3}},
    ),
    "OpenRouter": answer(
        {"content": "4", "reasoning": "two and two", "reasoning_details": [DETAIL]}, usage={**COUNTS, "cost": 0.25}
    ),
    "details alone": answer({"content": "4", "reasoning": None, "reasoning_details": [DETAIL, {"data": "x"}]}),
    "encrypted details": answer({"content": "4", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}),
    "thinking aloud": answer({"content": "<think>two and two</think>\n\n4"}),
    "thinking twice": answer({"content": "<think>and two</think>4", "reasoning": "two "}),
    "cost as an object": answer({"content": "4"}, usage={**COUNTS, "cost": {"total_cost": 0.5}}),
    "cost next to usage": answer({"content": "4"}, cost={"usd": 0.5}),
    "cut": answer({"content": "Hi, I"}, "length"),
}
PUT: tuple[Any, ...] = (None, "", "x", 0, 1.5, True, [], {}, [{}], ...)
UNUSUAL = {
    "parts": answer({"content": [{"type": "text", "text": "4"}]}),
    "two choices": {**USUAL["cut"], "choices": USUAL["cut"]["choices"] * 2},
    "no choices": {**USUAL["cut"], "choices": []},
    "a function call": answer({"content": None, "function_call": TOOL["function"]}),
    "a custom tool": answer({"tool_calls": [{"id": "1", "custom": {"name": "run", "input": "ls"}}]}, "tool_calls"),
    "arguments as an object": answer({"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}),
    "another word": answer({"content": "4"}, "eos"),
    "an error": {**USUAL["cut"], "error": {"message": "overloaded", "code": 503}},
    "an error in the choice": {"choices": [{**USUAL["cut"]["choices"][0], "error": {"code": 502}}]},
    "no usage": {**USUAL["cut"], "usage": None},
}


def codec() -> OpenAIChat:
    made = resolve("openai/gpt-4o-mini", api_key="sk-test", env={}).codec
    assert isinstance(made, OpenAIChat)
    return made


def reply(body: Any) -> HTTPReply:
    headers = {"x-request-id": "req_1"}
    return HTTPReply(status=200, body=json.dumps(body).encode(), headers=headers, milliseconds=5.0, replayed=True)


def damaged(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a good body's variants: each with one field removed or replaced."""

    def places(node: Any) -> Iterator[tuple[Any, Any]]:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            yield node, key
            yield from places(node[key])

    for position in range(len(list(places(body)))):
        for put in PUT:
            made = copy.deepcopy(body)
            node, key = list(places(made))[position]
            if put is ...:
                del node[key]
            else:
                node[key] = put
            yield made


READ = {
    "a refusal": ("", None, "stop", 0),
    "tool calls": ("", None, "tool_calls", 2),
    "no content, and no id of a tool call": ("", None, "tool_calls", 1),
    "DeepSeek": ("\n\n4", "two and two", "stop", 0),
    "OpenRouter": ("4", "two and two", "stop", 0),
    "details alone": ("4", "two and two", "stop", 0),
    "encrypted details": ("4", None, "stop", 0),
    "thinking aloud": ("4", "two and two", "stop", 0),
    "thinking twice": ("4", "two and two", "stop", 0),
    "cost as an object": ("4", None, "stop", 0),
    "cost next to usage": ("4", None, "stop", 0),
    "cut": ("Hi, I", None, "length", 0),
    "parts": ("4", None, "stop", 0),
    "two choices": ("Hi, I", None, "length", 0),
    "a function call": ("", None, "stop", 1),
    "a custom tool": ("", None, "tool_calls", 1),
    "arguments as an object": ("", None, "stop", 1),
    "another word": ("4", None, "stop", 0),
    "no usage": ("Hi, I", None, "length", 0),
}
FAILED = {"no choices": EmptyResponseError, "an error": ServerError, "an error in the choice": ServerError}


@pytest.mark.requirement(
    "client 6: thinking is no part of the text",
    "client 11: input, output, reasoning, cached; None is not 0",
)
@pytest.mark.parametrize("name", [*USUAL, *UNUSUAL])
def test_every_shape_is_read(name: str) -> None:
    """Text, thinking, finish reason and tool calls are found wherever a server puts them."""
    body = (USUAL | UNUSUAL)[name]
    if name in FAILED:
        with pytest.raises(FAILED[name]):
            codec().decode(reply(body), CALL)
        return
    found = codec().decode(reply(body), CALL)
    read = (found.text, found.reasoning, found.finish_reason, len(found.tool_calls))
    assert read == READ.get(name, ("Hi", None, "stop", 0))


@pytest.mark.parametrize("name", USUAL)
def test_a_damaged_answer_is_read_or_refused(name: str) -> None:
    """With one field missing or replaced, decoding gives an answer or an AggregatorError, no other exception."""
    for body in damaged(USUAL[name]):
        with suppress(LLMError):
            assert codec().decode(reply(body), CALL).choices
