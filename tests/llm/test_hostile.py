"""Hostile answers: any bytes give an answer or an AggregatorError, in bounded time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

import pytest
from bedrock_frames import frame

from aggregator.errors import LLMError
from aggregator.llm.calls import ChatCall, Codec, Target
from aggregator.llm.codecs.responses import OpenAIResponses
from aggregator.llm.messages import normalise
from aggregator.llm.names import resolve
from aggregator.records import Completion, HTTPReply

CALL = ChatCall(model="m", messages=({"role": "user", "content": "Hi"},))
TOOL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}, "cost": 0.1}
MESSAGE = {"role": "assistant", "content": "Hello", "tool_calls": [TOOL], "reasoning_content": "hm", "refusal": None}
CHOICE = {"index": 0, "message": MESSAGE, "finish_reason": "stop"}
TOOL_USE = {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}
THINKING = {"type": "thinking", "thinking": "hm", "signature": "s"}
FUNCTION_CALL = {"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "s"}
THOUGHT = {"text": "hm", "thought": True}
OUTPUT: list[dict[str, Any]] = [
    {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "e"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
    {"type": "function_call", "id": "fc", "call_id": "c", "name": "f", "arguments": '{"x": 1}'},
    {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "x"},
]
REASONED = {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "s"}}}
BEDROCK_USE = {"toolUse": {"toolUseId": "t", "name": "f", "input": {"x": 1}}}
CITED = {"citationsContent": {"content": [{"text": ""}], "citations": []}}
RESPONSE = {
    "id": "resp",
    "status": "completed",
    "model": "m",
    "error": None,
    "incomplete_details": None,
    "output": OUTPUT,
    "usage": {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 2},
}


class Family(NamedTuple):
    """A wire format: its codec, a whole answer, the events of a stream, and how to encode them."""

    make: Callable[[], Codec]
    answer: dict[str, Any]
    events: list[dict[str, Any]]
    pack: Callable[..., bytes]


def framed(events: list[Any], *, names: bool = True) -> bytes:
    return b"".join(frame("contentBlockDelta" if names else "", event) for event in events)


def sse(events: list[Any], *, names: bool = True) -> bytes:
    lines = []
    for event in events:
        kind = event.get("type") if isinstance(event, dict) and names else None
        lines.append(f"event: {kind}\n" if isinstance(kind, str) and "\n" not in kind else "")
        lines.append(f"data: {json.dumps(event)}\n\n")
    return "".join(lines).encode(errors="replace")


def named(model: str) -> Callable[[], Codec]:
    return lambda: resolve(model, env={}).codec


FAMILIES = {
    "openai": Family(
        named("openai/m"),
        {"id": "c", "model": "m", "choices": [CHOICE], "usage": USAGE},
        [
            {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "He"}}]},
            {"choices": [{"index": 0, "delta": {"content": "llo", "reasoning": "hm"}}]},
            {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **TOOL}]}}]},
            {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": USAGE},
        ],
        sse,
    ),
    "anthropic": Family(
        named("anthropic/m"),
        {
            "id": "msg",
            "model": "m",
            "content": [THINKING, {"type": "text", "text": "Hello"}, TOOL_USE],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 1},
        },
        [
            {"type": "message_start", "message": {"id": "msg", "content": [], "usage": {"input_tokens": 3}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
            {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Hello"}},
            {"type": "content_block_start", "index": 2, "content_block": {**TOOL_USE, "input": {}}},
            {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"x"'}},
            {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ": 1}"}},
            {"type": "content_block_stop", "index": 2},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
        ],
        sse,
    ),
    "gemini": Family(
        named("gemini/m"),
        {
            "candidates": [
                {"content": {"parts": [THOUGHT, {"text": "Hello"}, FUNCTION_CALL]}, "finishReason": "STOP"}
            ],
            "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 2, "thoughtsTokenCount": 1},
            "modelVersion": "m",
        },
        [
            {"candidates": [{"content": {"parts": [THOUGHT]}}]},
            {"candidates": [{"content": {"parts": [{"text": "Hello"}, FUNCTION_CALL]}, "index": 0}]},
            {"candidates": [{"finishReason": "STOP"}], "usageMetadata": {"promptTokenCount": 3}},
        ],
        sse,
    ),
    "responses": Family(
        lambda: OpenAIResponses(Target(provider="openai", model="m", base_url="https://api.openai.com/v1")),
        RESPONSE,
        [
            {"type": "response.created", "response": {**RESPONSE, "status": "in_progress", "output": []}},
            {"type": "response.output_item.added", "output_index": 1, "item": {**OUTPUT[1], "content": []}},
            {"type": "response.output_text.delta", "output_index": 1, "content_index": 0, "delta": "Hello"},
            {"type": "response.output_text.done", "output_index": 1, "content_index": 0, "text": "Hello"},
            {"type": "response.output_item.done", "output_index": 1, "item": OUTPUT[1]},
            {"type": "response.completed", "response": RESPONSE},
        ],
        sse,
    ),
    "bedrock": Family(
        lambda: resolve("bedrock/m", env={"AWS_REGION": "r"}).codec,
        {
            "output": {"message": {"content": [REASONED, {"text": "Hello"}, BEDROCK_USE, CITED]}},
            "stopReason": "end_turn",
            "usage": {"inputTokens": 3, "outputTokens": 2, "cacheReadInputTokens": 1},
        },
        [
            {"role": "assistant"},
            {"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "hm"}}},
            {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "s"}}},
            {"contentBlockIndex": 1, "delta": {"text": "Hello"}},
            {"contentBlockIndex": 2, "start": {"toolUse": {"toolUseId": "t", "name": "f"}}},
            {"contentBlockIndex": 2, "delta": {"toolUse": {"input": '{"x"'}}},
            {"contentBlockIndex": 2, "delta": {"toolUse": {"input": ": 1}"}}},
            {"stopReason": "end_turn"},
            {"usage": {"inputTokens": 3, "outputTokens": 2}},
        ],
        framed,
    ),
}  # fmt: skip

JUNK: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 2**64, 10**30, -(10**30), 1.5, 1e300, float("nan"), float("inf"),
    "", " ", "x", "5", "\ud83d", "\u0000", "<think>", "</think>", "\\", "[DONE]", "x" * 10_000,
    "[" * 5_000, '{"a":' * 5_000,
    [], [None], [[]], [{}], [1, "x"], {}, {"a": 1}, {"type": None}, {"error": "e"}, {"code": 429, "message": "m"},
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


def check(found: Completion) -> None:
    """Assert that an answer has texts and counts of the declared types, and can be sent back."""
    assert isinstance(found.text, str)
    assert isinstance(found.model, str)
    assert isinstance(found.id, str)
    for count in (found.usage.input_tokens, found.usage.output_tokens, found.usage.cached_tokens):
        assert count is None or type(count) is int
    for choice in found.choices:
        assert isinstance(choice.message.reasoning, str | None)
        for call in choice.message.tool_calls:
            assert (type(call.id), type(call.name), type(call.arguments)) == (str, str, str)


def decode(codec: Codec, body: bytes) -> None:
    try:
        check(codec.decode(HTTPReply(status=200, body=body, headers={}), CALL))
    except LLMError:
        return


def stream(codec: Codec, body: bytes, step: int = 0) -> None:
    reader = codec.stream(CALL)
    try:
        for start in range(0, len(body), step or len(body) or 1):
            deltas = reader.feed(body[start : start + (step or len(body))])
            assert all(isinstance(delta, str) for delta in deltas)
        check(reader.finish(HTTPReply(status=200, body=body, headers={})))
    except LLMError:
        return


families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@families
def test_the_undamaged_samples_are_read(family: Family) -> None:
    """The answers that are damaged below are valid to begin with."""
    codec = family.make()
    assert (
        codec.decode(HTTPReply(status=200, body=json.dumps(family.answer).encode(), headers={}), CALL).text == "Hello"
    )
    reader = codec.stream(CALL)
    deltas = reader.feed(family.pack(family.events))
    assert (
        "".join(deltas)
        == reader.finish(HTTPReply(status=200, body=family.pack(family.events), headers={})).text
        == "Hello"
    )


@families
def test_any_value_anywhere_in_an_answer(family: Family) -> None:
    """Each field of an answer is replaced by each kind of invalid value."""
    codec = family.make()
    for path in places(family.answer):
        for junk in JUNK:
            body = deepcopy(family.answer)
            put(body, path, junk)
            decode(codec, json.dumps(body).encode())


@families
def test_any_value_anywhere_in_a_stream(family: Family) -> None:
    """Each field of each event is replaced by each kind of invalid value, including the keys that position an item."""
    codec = family.make()
    for path in places(family.events):
        for junk in JUNK:
            events = deepcopy(family.events)
            put(events, path, junk)
            stream(codec, family.pack(events))


@families
def test_a_body_cut_anywhere(family: Family) -> None:
    """Every prefix of an answer and of a stream gives an answer or an AggregatorError."""
    codec = family.make()
    whole, events = json.dumps(family.answer).encode(), family.pack(family.events)
    for end in range(len(whole)):
        decode(codec, whole[:end])
    for end in range(len(events)):
        stream(codec, events[:end])
        decode(codec, events[:end])


@families
def test_events_lost_repeated_and_out_of_order(family: Family) -> None:
    """A stream with repeated, missing or reordered events raises only AggregatorErrors."""
    codec, random = family.make(), Random(5)
    for _ in range(300):
        events = [event for event in family.events for _ in range(random.choice([0, 1, 1, 2]))]
        if random.random() < 0.5:
            random.shuffle(events)
        stream(codec, family.pack(events, names=random.random() < 0.7), step=random.choice([0, 1, 13]))


@families
def test_bytes_changed_at_random(family: Family) -> None:
    """Bytes are flipped, inserted and removed, in answers and streams."""
    codec, random = family.make(), Random(11)
    for source, read in ((json.dumps(family.answer).encode(), decode), (family.pack(family.events), stream)):
        for _ in range(1500):
            body = bytearray(source)
            for _ in range(random.randint(1, 6)):
                place = random.randrange(len(body))
                body[place : place + random.choice([0, 1, 1, 5])] = random.randbytes(random.choice([0, 1, 1, 3]))
            read(codec, bytes(body))


NOISE: list[bytes] = [
    b"", b" ", b"\x00", b"\xff\xfe", b"{", b"[", b"]", b"null", b"true", b"1", b'"text"', b"[]", b"{}", b"[{}]", b"NaN",
    b"<html><title>502</title></html>", b"data:", b"data: ", b"data: {", b"data: []", b"data: null", b"data: 5",
    b'data: "x"', b"data: [DONE]", b"event: error\n\n", b"event: error\ndata:\n\n", b"event: error\ndata: x\n\n",
    b"event: e", b"event: response.created", b":", b": keep-alive\n\n", b"id: 1", b"retry: 5\n\n", b"\r", b"\r\n\r\n",
    b"\xef\xbb\xbf", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"data: " + b"[" * 100_000 + b"\n\n",
    b'{"usage": ' + b"9" * 5000 + b"}", b'{"choices": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"1e999999",
    b'{"content": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", b"\n" * 100_000, b"data: x\n" * 10_000,
    b"data: {}\n\n" * 2_000, b"error: x\n\n", b"error: {}\n\n", b"data\n\n", b"[DONE]", b"\xf0\x9f\x98",
]  # fmt: skip


@families
def test_noise(family: Family) -> None:
    """Random bytes as a body, as a stream, and in the middle of either."""
    codec = family.make()
    events = family.pack(family.events)
    for noise in NOISE:
        for body in (noise, events[: len(events) // 2] + noise, noise + events, noise + b"\n\n" + events):
            decode(codec, body)
            stream(codec, body)
            stream(codec, body, step=max(1, len(body) // 5))


@families
def test_an_answer_nested_deeper_than_pythons_recursion_limit(family: Family) -> None:
    """Deep nesting in a field that the codec keeps, in whole answers and in events."""
    codec = family.make()
    for depth in (100, 900, 1100, 5_000, 100_000):
        for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            for path in places(family.answer):
                body = deepcopy(family.answer)
                put(body, path, "DEEP")
                decode(codec, json.dumps(body).replace('"DEEP"', deep).encode())
            for path in places(family.events):
                if depth > 5_000:
                    continue
                events = deepcopy(family.events)
                put(events, path, "DEEP")
                stream(codec, family.pack(events).replace(b'"DEEP"', deep.encode()))


@families
@pytest.mark.parametrize("status", [199, 204, 300, 400, 401, 404, 418, 429, 500, 529, 999])
def test_an_error_status_with_any_body(family: Family, status: int) -> None:
    """An error status gives its error for any body."""
    codec = family.make()
    for body in [*NOISE, *(json.dumps({"error": junk, "message": junk}).encode() for junk in JUNK)]:
        if status >= 300:
            error = codec.error(HTTPReply(status=status, body=body, headers={"retry-after": "1e999"}))
            assert isinstance(error, LLMError)
            assert isinstance(error.message, str)


@families
def test_damaged_answers_are_sent_back(family: Family) -> None:
    """An answer that was read can be sent again, whatever its fields held: that is not the user's mistake."""
    codec = family.make()
    for path in places(family.answer):
        for junk in JUNK:
            body = deepcopy(family.answer)
            put(body, path, junk)
            try:
                found = codec.decode(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}), CALL)
            except LLMError:
                continue
            codec.encode(ChatCall(model="m", messages=normalise([CALL.messages[0], found, "Go on."])))
