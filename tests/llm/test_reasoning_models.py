"""Reasoning models: the name of their limit, room for thinking, and thinking that is sent back with tool calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llm_fakes import BASE_URL, QUESTION, ScriptedTransport, VirtualTime, answer, failure

from aggregator import LLM, Budget, LLMJudge, cassette
from aggregator.errors import APIConnectionError, BadRequestError, ConfigError, TruncatedError
from aggregator.llm.budget import ASSUMED_OUTPUT, THINKING_ROOM, thinks
from aggregator.llm.models import complete_own
from aggregator.records import HTTPReply, HTTPRequest

HINT = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
TOOL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}


def client(transport: ScriptedTransport, name: str = "openai-compatible/m", **options: Any) -> LLM:
    time = VirtualTime()
    base: dict[str, Any] = {"base_url": BASE_URL, "api_key": "k" * 9, "env": {}}
    return LLM(name, transport=transport, clock=time.clock, sleep=time.sleep, **(base | options))


def replying(body: Any) -> HTTPReply:
    return HTTPReply(status=200, body=msgspec.json.encode(body), headers={})


def refusing(field: str, message: str) -> Callable[[HTTPRequest], HTTPReply]:
    """A server that refuses a field with a message."""
    return lambda request: failure(400, message) if field in msgspec.json.decode(request.body) else answer()


def limits(transport: ScriptedTransport) -> list[tuple[Any, Any]]:
    return [(body.get("max_tokens"), body.get("max_completion_tokens")) for body in transport.bodies()]


async def test_the_servers_own_hint_was_ignored() -> None:
    """After a 400 that names max_completion_tokens the request is corrected at once, and every client remembers it."""
    transport = ScriptedTransport(refusing("max_tokens", HINT))
    llm = client(transport, budget=(budget := Budget(calls=10)))
    assert (await llm.complete(QUESTION, max_tokens=7)).attempts == 2
    await client(transport).complete(QUESTION, max_tokens=8)
    assert limits(transport) == [(7, None), (None, 7), (None, 8)]
    assert budget.spent.calls == 2


@pytest.mark.parametrize("key", ["token", "k", "max", "none"])
async def test_a_placeholder_as_the_key_hid_the_hint(key: str) -> None:
    """Local servers accept any key; one that is part of `max_completion_tokens` was masked inside it."""
    transport = ScriptedTransport(refusing("max_tokens", HINT))
    await client(transport, api_key=key).complete(QUESTION, max_tokens=7)
    assert limits(transport) == [(7, None), (None, 7)]


async def test_a_name_in_capitals_is_a_reasoning_model() -> None:
    """Gateways write model names in any case."""
    transport = ScriptedTransport(answer())
    await client(transport, "openai-compatible/GPT-5-mini").complete(QUESTION, max_tokens=7)
    assert limits(transport) == [(None, 7)]


async def test_a_server_that_does_not_know_the_newer_name() -> None:
    """The model's name looks like a reasoning model's, but the server only knows max_tokens."""
    transport = ScriptedTransport(refusing("max_completion_tokens", "Unknown field: max_completion_tokens"))
    await client(transport, "openai-compatible/gpt-5-mini").complete(QUESTION, max_tokens=7)
    assert limits(transport) == [(None, 7), (7, None)]


async def test_a_limit_that_is_too_large_is_not_a_hint() -> None:
    """The value is wrong, not the name: the user gets the error."""
    message = "max_completion_tokens is too large: 900000"
    transport = ScriptedTransport(refusing("max_completion_tokens", message))
    with pytest.raises(BadRequestError):
        await client(transport, "openai/gpt-5-mini", base_url=None).complete(QUESTION, max_tokens=900_000)
    assert len(transport.requests) == 1


async def test_a_hint_with_one_attempt_is_raised() -> None:
    """The corrected request counts as an attempt."""
    transport = ScriptedTransport(refusing("max_tokens", HINT))
    with pytest.raises(BadRequestError):
        await client(transport, max_attempts=1).complete(QUESTION, max_tokens=7)


async def test_a_stream_obeys_the_hint() -> None:
    """Before its first delta a stream is retried."""
    chunk = b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'

    def respond(request: HTTPRequest) -> HTTPReply:
        if "max_tokens" in msgspec.json.decode(request.body):
            return failure(400, HINT)
        return HTTPReply(status=200, body=chunk, headers={"content-type": "text/event-stream"})

    assert [delta async for delta in client(ScriptedTransport(respond)).stream(QUESTION, max_tokens=7)] == ["hi"]


async def test_a_replay_obeys_a_recorded_hint(tmp_path: Path) -> None:
    """A hint learned before, during or after a recording does not change a replay's requests."""
    transport = ScriptedTransport(refusing("max_tokens", HINT))
    with cassette(tmp_path / "a.jsonl", "once"):
        llm = client(transport)
        recorded = [await llm.complete(text, max_tokens=7) for text in ("a", "b", "c")]
    offline = ScriptedTransport(APIConnectionError("no network"))
    for order in ("abc", "cab"):
        with cassette(tmp_path / "a.jsonl", "none"):
            played = [await client(offline).complete(text, max_tokens=7) for text in order]
    assert [completion.text for completion in played] == [completion.text for completion in recorded]
    assert offline.requests == []


async def test_a_reasoning_model_behind_a_gateway_got_the_limit_for_local_servers() -> None:
    """By default no limit is sent: thinking would use it up."""
    transport = ScriptedTransport(answer())
    await client(transport, "openai-compatible/gpt-5-mini").complete(QUESTION)
    assert limits(transport) == [(None, None)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("o3-mini", True), ("gpt-5.2", True), ("openai/gpt-oss-120b", True), ("gemini-2.5-flash", True),
        ("qwq-32b", True),
        ("deepseek-reasoner", True), ("kimi-k2-thinking", True), ("deepseek-ai/DeepSeek-R1", True), ("grok-4", True),
        ("gpt-4o-mini", False), ("gpt-35-turbo", False), ("claude-sonnet-4-5", False), ("qwen3:8b", False),
        ("gemini-2.0-flash", False), ("llama-3.3-70b", False), ("gpt-4.1", False),
    ],
)  # fmt: skip
def test_reasoning_models_by_name(name: str, expected: bool) -> None:
    """Known families and explicit names are recognised, and no other name is."""
    assert thinks(name) is expected


async def test_a_budget_left_a_reasoning_model_no_room_to_answer() -> None:
    """If the call has no limit, a budget of tokens sends one with room for thinking."""
    for name, expected in (("m", (ASSUMED_OUTPUT, None)), ("gpt-5-mini", (None, ASSUMED_OUTPUT + THINKING_ROOM))):
        transport = ScriptedTransport(answer())
        await client(transport, f"openai-compatible/{name}", budget=Budget(tokens=10**6)).complete(QUESTION)
        assert limits(transport) == [expected]


def needing(tokens: int, *, text: str = '{"score": 1, "feedback": "good"}', thought: str | None = None) -> Any:
    """A server whose model thinks for a number of tokens before it answers."""

    def respond(request: HTTPRequest) -> HTTPReply:
        body = msgspec.json.decode(request.body)
        cap = body.get("max_completion_tokens") or body.get("max_tokens")
        cut = cap is not None and cap < tokens
        message = {"role": "assistant", "content": "" if cut else text, "reasoning_content": thought}
        return replying({"choices": [{"message": message, "finish_reason": "length" if cut else "stop"}]})

    return ScriptedTransport(respond)


async def test_a_judges_limit_left_no_room_for_thinking() -> None:
    """A verdict that thinking used up is requested again with room; a known reasoning model gets the room at once."""
    unknown = needing(4000)
    assert (await LLMJudge(client(unknown))("q", "a", "b")).score == 1.0
    assert [cap for cap, _ in limits(unknown)] == [1024, 1024 + THINKING_ROOM]
    known = needing(4000)
    assert (await LLMJudge(client(known, "openai-compatible/gpt-5-mini"))("q", "a", "b")).score == 1.0
    assert [cap for _, cap in limits(known)] == [1024 + THINKING_ROOM]
    asked = needing(4000)
    llm = client(asked, extra={"reasoning_effort": "high"})
    assert (await LLMJudge(llm)("q", "a", "b")).score == 1.0
    assert [cap for cap, _ in limits(asked)] == [1024 + THINKING_ROOM]


async def test_an_answer_that_is_too_long_is_not_requested_again() -> None:
    """Without thinking a truncated answer is final."""
    body = {"choices": [{"message": {"content": "half a sen"}, "finish_reason": "length"}]}
    transport = ScriptedTransport(replying(body))
    completion = await complete_own(client(transport), QUESTION, max_tokens=5)
    assert (completion.text, completion.finish_reason, len(transport.requests)) == ("half a sen", "length", 1)
    transport = ScriptedTransport(replying(body))
    with pytest.raises(TruncatedError):
        await complete_own(client(transport), QUESTION, max_tokens=5, response_format={"type": "json_object"})
    assert len(transport.requests) == 1


async def test_fields_and_headers_of_all_calls() -> None:
    """The client's `extra` and `headers` are sent with every call; a call's own values override them."""
    transport = ScriptedTransport(answer())
    llm = client(
        transport,
        extra={"service_tier": "flex", "provider": {"sort": "price"}},
        headers={"X-Title": "routes", "Helicone-Auth": "Bearer gateway-key-123"},
    )
    await llm.complete(QUESTION, extra={"provider": {"only": ["groq"]}, "service_tier": "priority"})
    (body,), (request,) = transport.bodies(), transport.requests
    assert body["service_tier"] == "priority"
    assert body["provider"] == {"sort": "price", "only": ["groq"]}
    assert (request.headers["x-title"], request.headers["helicone-auth"]) == ("routes", "Bearer gateway-key-123")
    assert request.secrets == ("k" * 9, "gateway-key-123")


async def test_an_authentication_header_replaces_the_key() -> None:
    """No key is read, and none is sent."""
    transport = ScriptedTransport(answer())
    await client(transport, "openai/gpt-4o-mini", api_key=None, headers={"Authorization": "Bearer own"}).complete("q")
    assert transport.requests[0].headers["authorization"] == "Bearer own"


@pytest.mark.parametrize(
    "options",
    [
        {"headers": {"a b": "x"}},
        {"headers": {"x": "a\nb"}},
        {"headers": {"x": 3}},
        {"extra": [1]},
        {"headers": {3: "x"}},
    ],
)
def test_invalid_headers_and_fields(options: dict[str, Any]) -> None:
    """They are refused when the client is created."""
    with pytest.raises(ConfigError, match=r"LLM\.(headers|extra)"):
        client(ScriptedTransport(answer()), **options)


def calling(**message: Any) -> HTTPReply:
    shown = {"role": "assistant", "content": None, "tool_calls": [TOOL], **message}
    return replying({"choices": [{"message": shown, "finish_reason": "tool_calls"}]})


DETAILS = [{"type": "reasoning.encrypted", "data": "abc", "id": "c1", "format": "google-gemini-v1", "index": 0}]


@pytest.mark.parametrize(
    "name", ["deepseek/deepseek-reasoner", "moonshot/kimi-k2", "openrouter/m", "openai-compatible/m"]
)
@pytest.mark.parametrize("thinking", [{"reasoning_content": "I need f"}, {"reasoning_details": DETAILS}])
async def test_thinking_was_not_sent_back_with_a_tool_call(name: str, thinking: dict[str, Any]) -> None:
    """A server that thinks before a tool call gets its thinking back unchanged, with that message."""
    transport = ScriptedTransport(calling(**thinking), answer("done"))
    llm = client(transport, name)
    first = await llm.complete(QUESTION)
    await llm.complete([*QUESTION, first, RESULT])
    sent = transport.bodies()[1]["messages"][1]
    assert {key: sent.get(key) for key in thinking} == thinking
    assert sent["tool_calls"] == [TOOL]


async def test_thinking_is_sent_back_only_where_it_is_needed() -> None:
    """Without a tool call, and to another server, no thinking is sent."""
    plain = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    transport = ScriptedTransport(replying({"choices": [{"message": plain, "finish_reason": "stop"}]}), answer())
    llm = client(transport)
    first = await llm.complete(QUESTION)
    await llm.complete([*QUESTION, first, "and?"])
    assert set(transport.bodies()[1]["messages"][1]) == {"role", "content"}
    called, other = ScriptedTransport(calling(reasoning_content="I need f")), ScriptedTransport(answer())
    turn = await client(called).complete(QUESTION)
    await client(other, base_url="http://127.0.0.1:8/v1").complete([*QUESTION, turn, RESULT])
    assert set(other.bodies()[0]["messages"][1]) == {"role", "content", "tool_calls"}


async def test_a_server_that_refuses_its_own_thinking() -> None:
    """After a 400 about the unknown field the request is sent without it."""

    def respond(request: HTTPRequest) -> HTTPReply:
        messages = msgspec.json.decode(request.body)["messages"]
        if len(messages) == 1:
            return calling(reasoning_content="I need f")
        refused = "reasoning_content" in messages[1]
        return failure(400, "property 'reasoning_content' is unsupported") if refused else answer("done")

    llm = client(ScriptedTransport(respond))
    first = await llm.complete(QUESTION)
    assert (await llm.complete([*QUESTION, first, RESULT])).text == "done"


async def test_geminis_signature_over_its_openai_endpoint() -> None:
    """The signature of a call is sent back to its server, and otherwise to Google's only."""
    signed = {**TOOL, "extra_content": {"google": {"thought_signature": "sig"}}}
    for address, kept in (("http://127.0.0.1:9/v1", True), ("http://127.0.0.1:8/v1", False)):
        transport = ScriptedTransport(calling(tool_calls=[signed]))
        first = await client(transport).complete(QUESTION)
        assert first.tool_calls[0].signature == "sig"
        again = ScriptedTransport(answer())
        await client(again, base_url=address).complete([*QUESTION, first, RESULT])
        assert ("extra_content" in again.bodies()[0]["messages"][1]["tool_calls"][0]) is kept


async def test_streamed_thinking_is_sent_back() -> None:
    """The pieces of a stream are joined under their original name."""
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "I need "},
        {"reasoning_content": "f"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "I ", "index": 0}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "need f", "index": 0, "signature": "s"}]},
        {"tool_calls": [{**TOOL, "index": 0}]},
    ]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    body = b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    streamed = HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})
    transport = ScriptedTransport(streamed, answer("done"))
    llm = client(transport)
    stream = llm.stream(QUESTION)
    assert [delta async for delta in stream] == []
    await llm.complete([*QUESTION, stream.completion, RESULT])
    sent = transport.bodies()[1]["messages"][1]
    assert sent["reasoning_content"] == "I need f"
    assert sent["reasoning_details"] == [{"type": "reasoning.text", "text": "I need f", "index": 0, "signature": "s"}]
