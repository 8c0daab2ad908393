"""The short way of the usual chat completion: who takes it, and that it reads what the long way reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from aggregator.errors import LLMError
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.openai import OpenAIChat
from aggregator.llm.codecs.openai_answers import decode_usual
from aggregator.llm.codecs.wire import REFUSED
from aggregator.llm.providers import resolve
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
    "cost beside usage": answer({"content": "4"}, cost={"usd": 0.5}),
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


def both_ways(body: Any) -> tuple[Any, Any]:
    """What an answer reads as by way of `decode`, and by the long way alone; an error as its class and words."""
    found: list[Any] = []
    for way in (codec().decode, codec().decode_unusual):
        try:
            found.append(way(reply(body), CALL))
        except LLMError as error:
            found.append((type(error), str(error)))
    return found[0], found[1]


def damaged(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every body that comes of a good one by taking one field out, or putting something else into it."""

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


@pytest.mark.parametrize("name", USUAL)
def test_usual_answer_takes_the_short_way(name: str) -> None:
    """What the servers in use send is decoded once."""
    assert len(decode_usual(reply(USUAL[name]).body).choices) == 1


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_answer_is_refused_by_the_short_way(name: str) -> None:
    """A shape that the short way does not know is never half read."""
    with pytest.raises(REFUSED):
        decode_usual(reply(UNUSUAL[name]).body)


@pytest.mark.parametrize("name", [*USUAL, *UNUSUAL])
def test_both_ways_read_the_same(name: str) -> None:
    """Which way an answer takes changes how long it takes, nothing else."""
    short, long = both_ways((USUAL | UNUSUAL)[name])
    assert short == long


@pytest.mark.parametrize("name", USUAL)
def test_both_ways_read_the_same_of_a_damaged_answer(name: str) -> None:
    """Any one field gone, or holding something else, is read or refused alike."""
    for body in damaged(USUAL[name]):
        short, long = both_ways(body)
        assert short == long, body
