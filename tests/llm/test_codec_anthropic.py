"""Anthropic's Messages API: requests are encoded, answers are decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llm_fakes import ScriptedTransport
from msgspec.structs import replace

from aggregator import LLM
from aggregator.errors import ConfigError, DecodeError, EmptyResponseError, ServerError
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.anthropic import AnthropicMessages
from aggregator.llm.messages import Image, normalise
from aggregator.llm.names import resolve
from aggregator.records import Completion, HTTPReply, HTTPRequest

CALL = ChatCall(model="claude-sonnet-4-5", messages=({"role": "user", "content": "Hi"},))


def request(call: ChatCall, **given: Any) -> HTTPRequest:
    return resolve("anthropic/claude-sonnet-4-5", api_key="k", env={}, **given).codec.encode(call)


def body(call: ChatCall) -> Any:
    return json.loads(request(call).body)


def sent(messages: Any) -> Any:
    return body(replace(CALL, messages=normalise(messages)))


def decode(answer: Any) -> Completion:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    codec = resolve("anthropic/claude", env={}).codec
    return codec.decode(HTTPReply(status=200, body=data, headers={"request-id": "req_1", "retry-after": "9"}), CALL)


@pytest.mark.requirement("client 12: Anthropic: version, x-api-key, max_tokens")
def test_request() -> None:
    """Version and key are headers, and the limit that the API requires is added."""
    made = request(CALL)
    assert made.url == "https://api.anthropic.com/v1/messages"
    assert made.headers["anthropic-version"] == "2023-06-01"
    assert made.headers["x-api-key"] == "k"
    assert json.loads(made.body) == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": "Hi"}],
    }


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:8/v1", "http://127.0.0.1:8", "http://127.0.0.1:8/"])
def test_address_with_and_without_version(base_url: str) -> None:
    """A base_url may hold /v1 or not."""
    assert request(CALL, base_url=base_url).url == "http://127.0.0.1:8/v1/messages"


def test_auth_token_is_a_bearer() -> None:
    """ANTHROPIC_AUTH_TOKEN is sent as a bearer token, as Anthropic's SDK does."""
    made = resolve("anthropic/claude", env={"ANTHROPIC_AUTH_TOKEN": "t"}).codec.encode(CALL)
    assert made.headers["authorization"] == "Bearer t"
    assert "x-api-key" not in made.headers


@pytest.mark.requirement("built 3: options and tools")
def test_options() -> None:
    """Options are sent under this API's names."""
    schema = {"type": "object", "properties": {}}
    call = replace(
        CALL,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop="END",
        tools=(
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}},
            {"type": "web_search_20250305", "name": "web_search"},
        ),
        tool_choice="required",
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        stream=True,
        extra={"metadata": {"user_id": "u"}},
    )
    assert body(call) == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "stop_sequences": ["END"],
        "tools": [
            {"name": "f", "description": "d", "input_schema": schema},
            {"type": "web_search_20250305", "name": "web_search"},
        ],
        "tool_choice": {"type": "any"},
        "output_config": {"format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}},
        "stream": True,
        "metadata": {"user_id": "u"},
    }


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
        ({"type": "any"}, {"type": "any"}),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    """OpenAI's values of `tool_choice` are converted to this API's."""
    assert body(replace(CALL, tool_choice=choice))["tool_choice"] == expected


@pytest.mark.parametrize("given", [{"n": 2}, {"seed": 1}, {"tool_choice": "perhaps"}])
def test_unsupported_options_are_refused(given: Any) -> None:
    """`n` and a seed do not exist here: they raise before anything is sent."""
    with pytest.raises(ConfigError, match=next(iter(given))):
        request(replace(CALL, **given))


def test_system_prompt() -> None:
    """One system text is sent as a string, several as blocks, and none of them as a message."""
    one = sent([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}])
    assert (one["system"], one["messages"]) == ("Be brief", [{"role": "user", "content": "Hi"}])
    two = sent(
        [{"role": "system", "content": "a"}, {"role": "user", "content": "Hi"}, {"role": "developer", "content": "b"}]
    )
    assert two["system"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.requirement("built 3: text and images")
def test_images() -> None:
    """Images are sent as base64 or as a URL; blocks of this API are sent unchanged."""
    own = {"type": "document", "source": {"type": "text", "data": "x"}}
    (message,) = sent([{"role": "user", "content": ["Look", Image(b"\x89PNG1"), Image("https://x/y.png"), own]}])[
        "messages"
    ]
    assert message["content"] == [
        {"type": "text", "text": "Look"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORzE="}},
        {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
        own,
    ]


def test_a_turn_with_tools() -> None:
    """Calls become tool_use blocks; the results of one turn become one user message."""
    calls = [
        {"id": i, "type": "function", "function": {"name": "f", "arguments": a}}
        for i, a in (("a", '{"x": 1}'), ("b", ""))
    ]
    messages = sent(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": "1"},
            {"role": "tool", "tool_call_id": "b", "content": "2"},
        ]
    )["messages"]
    assert messages[1]["content"] == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "b", "name": "f", "input": {}},
    ]
    assert [block["tool_use_id"] for block in messages[2]["content"]] == ["a", "b"]
    assert len(messages) == 3


@pytest.mark.requirement("client 9: arguments that do not parse stay text")
@pytest.mark.parametrize("text", ['{"x', "no JSON", "[1]", "[" * 100_000])
@pytest.mark.parametrize("name", ["anthropic/m", "gemini/m", "bedrock/m"])
def test_arguments_that_are_no_json_ended_the_run(name: str, text: str) -> None:
    """Broken or truncated arguments are sent as a string within an object, without a ConfigError."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": text}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    codec = resolve(name, api_key="k", base_url="https://x.example", env={"AWS_REGION": "us-east-1"}).codec
    request = codec.encode(ChatCall(model="m", messages=normalise(messages)))
    assert b'{"invalid_json":' in request.body


def answer(*blocks: Any, **more: Any) -> dict[str, Any]:
    return {"type": "message", "id": "m", "model": "c", "content": list(blocks), "stop_reason": "end_turn", **more}


@pytest.mark.requirement("client 6: unknown keys and blocks", "client 6: thinking is no part of the text")
def test_blocks() -> None:
    """Text blocks are joined, thinking and tool calls are kept apart, and unknown kinds are skipped."""
    found = decode(
        answer(
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "…"},
            {"type": "text", "text": "He", "citations": [{"type": "x"}]},
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": 1}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "r"}]},
            {"type": "compaction", "content": "…"},
            {"type": "never seen", "text": 5, "input": [1]},
            {"type": "text", "text": "llo"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"x": [1, {"y": None}]}},
            stop_reason="tool_use",
            stop_details=None,
        )
    )
    assert (found.text, found.reasoning, found.finish_reason) == ("Hello", "hm", "tool_calls")
    assert [(call.id, call.name) for call in found.tool_calls] == [("t", "f")]
    assert json.loads(found.tool_calls[0].arguments) == {"x": [1, {"y": None}]}
    assert (found.id, found.model, found.request_id, found.raw_finish_reason) == ("m", "c", "req_1", "tool_use")


@pytest.mark.parametrize("content", [[], "", [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_an_answer(content: Any) -> None:
    """`content: []` with end_turn is a valid, empty answer."""
    assert decode({**answer(), "content": content}).text == ""


def test_content_as_text() -> None:
    """A gateway may answer with a string instead of blocks."""
    assert decode({**answer(), "content": "Hi"}).text == "Hi"


@pytest.mark.requirement("client 6: unknown finish reasons", "client 9: always visible")
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "length"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        (None, "stop"),
    ],
)
def test_stop_reasons(word: str | None, reason: str) -> None:
    """Each stop reason is mapped to one of OpenAI's four."""
    assert decode(answer(stop_reason=word)).finish_reason == reason


@pytest.mark.requirement("client 11: Anthropic's caches count as input")
def test_usage_counts_caches_as_input() -> None:
    """The API counts cached tokens separately from `input_tokens`; our input is the whole prompt."""
    usage = {
        "input_tokens": 1,
        "cache_creation_input_tokens": 2,
        "cache_read_input_tokens": 4,
        "output_tokens": 8,
        "output_tokens_details": {"thinking_tokens": 3},
        "cache_creation": {"ephemeral_5m_input_tokens": 2},
        "server_tool_use": None,
    }
    found = decode(answer(usage=usage)).usage
    assert (found.input_tokens, found.cached_tokens, found.output_tokens, found.reasoning_tokens) == (7, 4, 8, 3)
    assert decode(answer()).usage.input_tokens is None


@pytest.mark.requirement("client 7: no content")
@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, ServerError),
        ({"type": "message"}, EmptyResponseError),
        (b"", DecodeError),
        (b"<html>", DecodeError),
    ],
)
def test_a_200_that_is_an_error(raw: Any, kind: type[Exception]) -> None:
    """An error body with status 200 is an error."""
    with pytest.raises(kind) as caught:
        decode(raw)
    assert type(caught.value) is kind


def test_a_conversation_continues_with_our_own_answer() -> None:
    """A Completion can be appended to the messages."""
    found = decode(answer({"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}))
    messages = sent(["Hi", found, {"role": "tool", "tool_call_id": "t", "content": "1"}])["messages"]
    assert messages[1] == {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}],
    }


THINKING = {"type": "thinking", "thinking": "hm", "signature": "sig="}
REDACTED = {"type": "redacted_thinking", "data": "enc"}
CALLED = {"type": "tool_use", "id": "t", "name": "f", "input": {"x": [1.0, None]}}
RESULT = {"role": "tool", "tool_call_id": "t", "content": "1"}


@pytest.mark.requirement("built 3: an answer continues its conversation")
@pytest.mark.parametrize(
    "blocks",
    [
        [THINKING, CALLED],
        [REDACTED, {"type": "text", "text": "Look."}, CALLED],
        [THINKING, {"type": "text", "text": "So"}, {**THINKING, "signature": "2"}, CALLED, {**THINKING, "data": 3}],
        [{"type": "thinking", "thinking": "", "signature": "hidden"}, CALLED],
        [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"encrypted_content": "e"}]},
            {"type": "text", "text": "4", "citations": [{"encrypted_index": "i"}]}],
        [{"type": "compaction", "content": "so far"}, {"type": "text", "text": "4"}],
    ],
    ids=["thinking", "redacted", "interleaved", "hidden", "searched", "compacted"],
)  # fmt: skip
def test_blocks_go_back_as_they_came(blocks: list[Any]) -> None:
    """Signed thinking and other blocks of the API are sent back unchanged and in their places."""
    found = decode(answer(*blocks))
    messages = sent(["Hi", found, RESULT])["messages"]
    assert messages[1] == {"role": "assistant", "content": blocks}
    assert sent(["Hi", found.choices[0].message, RESULT])["messages"][1] == messages[1]


def test_empty_texts_do_not_go_back() -> None:
    """The API returns empty texts but refuses to receive them."""
    messages = sent(["Hi", decode(answer(THINKING, {"type": "text", "text": ""}, CALLED)), RESULT])["messages"]
    assert messages[1]["content"] == [THINKING, CALLED]


def test_a_changed_answer_is_sent_without_its_signed_blocks() -> None:
    """If the user edits an answer, its signature no longer matches, so the edited text alone is sent."""
    message = decode(answer(THINKING, {"type": "text", "text": "The key is 1234"})).choices[0].message
    (_, turn) = sent(["Hi", replace(message, content="The key is ****")])["messages"]
    assert turn["content"] == [{"type": "text", "text": "The key is ****"}]


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "gemini/gemini-2.5-flash", "azure/d", "ollama/q"])
def test_no_other_provider_sees_signed_thinking(model: str) -> None:
    """Another provider's server would refuse the unknown fields, so they are left out."""
    found = decode(answer(THINKING, {"type": "text", "text": "4"}))
    codec = resolve(model, api_key="k", base_url="http://127.0.0.1:9", env={}).codec
    request = codec.encode(replace(CALL, messages=normalise(["Hi", found])))
    assert b'"4"' in request.body
    assert not [word for word in (b"sig=", b"hm", b"source", b"thinking") if word in request.body]


async def test_a_conversation_with_tools_and_thinking() -> None:
    """`messages + [completion]` is what an agent's loop writes: the next request holds the answer's thinking."""

    def reply(*blocks: Any) -> HTTPReply:
        return HTTPReply(status=200, body=json.dumps(answer(*blocks)).encode(), headers={})

    transport = ScriptedTransport(reply(THINKING, CALLED), reply({"type": "text", "text": "1"}))
    llm = LLM("anthropic/claude-sonnet-4-5", api_key="k", env={}, transport=transport)
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    messages += [await llm.complete(messages), RESULT]
    assert (await llm.complete(messages)).text == "1"
    assert transport.bodies()[1]["messages"][1]["content"] == [THINKING, CALLED]


def test_the_codec_is_bound() -> None:
    """The endpoint of an Anthropic model has Anthropic's codec."""
    assert isinstance(resolve("claude-sonnet-4-5", env={}).codec, AnthropicMessages)


def test_a_schema_that_the_api_refuses_for_its_keywords() -> None:
    """Objects are closed and limits removed, because the API refuses them; the client checks them instead."""
    inner = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}, "minimum": {"type": "string"}}}
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": inner, "minItems": 2}}}
    call = ChatCall(
        model="claude",
        messages=({"role": "user", "content": "Hi"},),
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    codec = resolve("anthropic/claude-sonnet-4-5", api_key="k", env={}).codec
    sent = json.loads(codec.encode(call).body)["output_config"]["format"]["schema"]
    closed = {"additionalProperties": False}
    item = {"type": "object", "properties": {"n": {"type": "integer"}, "minimum": {"type": "string"}}, **closed}
    assert sent == {"type": "object", "properties": {"a": {"type": "array", "items": item}}, **closed}


def test_a_thinking_budget_above_the_assumed_limit_was_refused() -> None:
    """Thinking counts in max_tokens, so the default limit leaves room for it."""
    extra = {"thinking": {"type": "enabled", "budget_tokens": 8000}}
    call = ChatCall(model="claude", messages=({"role": "user", "content": "Hi"},), extra=extra)
    codec = resolve("anthropic/claude-sonnet-4-5", api_key="k", env={}).codec
    assert json.loads(codec.encode(call).body)["max_tokens"] == 4096 + 8000
    assert json.loads(codec.encode(replace(call, max_tokens=9000)).body)["max_tokens"] == 9000
