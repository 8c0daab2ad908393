"""The Responses API: requests, answers, and which answers are errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aggregator.errors import (
    APIConnectionError,
    BadRequestError,
    BrokenResponseError,
    ConfigError,
    ContentFilterError,
    DecodeError,
    EmptyResponseError,
    LLMError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from aggregator.llm.calls import ChatCall, Target
from aggregator.llm.codecs.responses import OpenAIResponses
from aggregator.llm.messages import Image, normalise
from aggregator.llm.retry import check_answer
from aggregator.records import Completion, HTTPReply

HI = [{"role": "user", "content": "Hi"}]
ENCRYPTED = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
CALL_F = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "f",
    "arguments": "{}",
    "status": "completed",
}

FUNCTION_F = {"type": "function", "function": {"name": "f"}}
SERVER_ERROR = {"code": "server_error", "message": "m"}


def codec(base_url: str = "https://api.openai.com/v1") -> OpenAIResponses:
    return OpenAIResponses(Target(provider="openai", model="m", base_url=base_url))


def encode(messages: Any = HI, *, model: str = "gpt-5", **options: Any) -> dict[str, Any]:
    call = ChatCall(model=model, messages=normalise(messages), **options)
    body: dict[str, Any] = json.loads(codec().encode(call).body)
    return body


def message(*parts: Any, **more: Any) -> dict[str, Any]:
    texts = [
        {"type": "output_text", "text": part, "annotations": []} if isinstance(part, str) else part for part in parts
    ]
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": texts, **more}


def response(*output: Any, status: Any = "completed", **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "model": "gpt-5", "status": status, "output": list(output), **more}


def decode(body: Any) -> Completion:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = ChatCall(model="gpt-5", messages=normalise(HI))
    return codec().decode(HTTPReply(status=200, body=data, headers={"x-request-id": "req_1"}), call)


def events(*found: dict[str, Any]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in found)


def stream(body: bytes) -> tuple[list[str], Completion]:
    reader = codec().stream(ChatCall(model="gpt-5", messages=normalise(HI), stream=True))
    deltas = reader.feed(body)
    return deltas, reader.finish(HTTPReply(status=200, body=body, headers={}))


def test_a_plain_question() -> None:
    """Options that are None are not sent; reasoning is requested encrypted and not stored on the server."""
    assert encode() == {
        "model": "gpt-5",
        "input": [{"role": "user", "content": "Hi"}],
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }


@pytest.mark.parametrize(
    ("model", "memory"),
    [
        ("gpt-5-pro", {"store": False, "include": ["reasoning.encrypted_content"]}),
        ("o4-mini", {"store": False, "include": ["reasoning.encrypted_content"]}),
        ("gpt-5.3-codex", {"store": False, "include": ["reasoning.encrypted_content"]}),
        ("codex-mini-latest", {"store": False, "include": ["reasoning.encrypted_content"]}),
        ("grok-4.3", {"store": False, "include": ["reasoning.encrypted_content"]}),
        ("gpt-10", {"store": False, "include": ["reasoning.encrypted_content"]}),
        ("gpt-4o", {"store": False}),
        ("gpt-35-turbo", {"store": False}),
        ("gpt-5-chat-latest", {"store": False}),
        ("gpt-5.2-chat-latest", {"store": False}),
        ("grok-3-mini", {"store": False}),
        ("my-deployment", {}),
        ("Qwen/Qwen3-4B", {}),
    ],
)  # fmt: skip
def test_encrypted_reasoning_is_requested_of_reasoning_models_alone(model: str, memory: dict[str, Any]) -> None:
    """Other models refuse the option; a model of an unknown name keeps the server's defaults."""
    body = encode(model=model)
    assert {name: body[name] for name in ("store", "include") if name in body} == memory


def test_options_under_this_apis_names() -> None:
    """The limit, the temperature, tools and tool choice are in this API's flat form; strict is off by default."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = encode(
        max_tokens=100,
        temperature=0.5,
        top_p=0.9,
        tools=(tool, {"type": "web_search"}, {"type": "custom", "custom": {"name": "c"}}),
        tool_choice={"type": "function", "function": {"name": "f"}},
        stream=True,
    )
    assert {k: v for k, v in body.items() if k not in ("model", "input", "store", "include")} == {
        "max_output_tokens": 100,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": [
            {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}, "strict": False},
            {"type": "web_search"},
            {"type": "custom", "name": "c"},
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "stream": True,
    }


def test_a_grammar_of_a_custom_tool_is_flat_here() -> None:
    """Chat completions nest the grammar one level deeper."""
    grammar = {"definition": "start: /a/", "syntax": "lark"}
    tool = {"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": grammar}}}
    assert encode(tools=(tool,))["tools"] == [{"type": "custom", "name": "c", "format": {"type": "grammar", **grammar}}]


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("auto", "auto"),
        ("any", "required"),
        ("none", "none"),
        ({"type": "custom", "custom": {"name": "c"}}, {"type": "custom", "name": "c"}),
        ({"type": "function", "name": "f"}, {"type": "function", "name": "f"}),
        ({"type": "web_search"}, {"type": "web_search"}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FUNCTION_F]}},
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        ),
    ],
)  # fmt: skip
def test_tool_choices(choice: Any, sent: Any) -> None:
    """Each form of chat completions is converted; the API's own forms are sent as they are."""
    assert encode(tool_choice=choice)["tool_choice"] == sent


def test_an_unknown_tool_choice() -> None:
    """An invalid value is rejected before anything is sent."""
    with pytest.raises(ConfigError, match="sometimes"):
        encode(tool_choice="sometimes")


def test_structured_output() -> None:
    """A schema is sent as text.format, together with the user's own text options."""
    schema = {"type": "object", "properties": {}}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    body = encode(response_format=wanted, extra={"text": {"verbosity": "low"}})
    assert body["text"] == {
        "format": {"type": "json_schema", "name": "answer", "strict": True, "schema": schema},
        "verbosity": "low",
    }
    assert encode(response_format={"type": "json_object"})["text"] == {"format": {"type": "json_object"}}


def test_names_of_chat_completions_in_extra() -> None:
    """One `extra` works with both APIs: effort, verbosity and the limit are renamed."""
    extra = {"reasoning_effort": "high", "verbosity": "low", "max_completion_tokens": 50, "service_tier": "flex"}
    body = encode(max_tokens=10, extra=extra)
    assert body["reasoning"] == {"effort": "high"}
    assert body["text"] == {"verbosity": "low"}
    assert body["max_output_tokens"] == 50
    assert body["service_tier"] == "flex"
    assert not {"reasoning_effort", "verbosity", "max_completion_tokens"} & set(body)


@pytest.mark.parametrize("option", [{"stop": "x"}, {"seed": 1}, {"n": 2}])
def test_unsupported_options_are_refused(option: dict[str, Any]) -> None:
    """An option without a field raises; it is not dropped silently."""
    with pytest.raises(ConfigError, match=next(iter(option))):
        encode(**option)


def test_background_answers_are_refused() -> None:
    """An answer that must be fetched later would look empty."""
    with pytest.raises(ConfigError, match="background"):
        encode(extra={"background": True})
    assert encode(extra={"background": True}, stream=True)["background"] is True


def test_parts_of_messages() -> None:
    """Texts, images and files are converted; the API's own parts are sent as they are."""
    parts = [
        "Look",
        Image("https://example.com/cat.png", detail="low"),
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "input_file", "file_url": "https://example.com/a.pdf"},
    ]
    assert encode([{"role": "user", "content": parts}])["input"][0]["content"] == [
        {"type": "input_text", "text": "Look"},
        {"type": "input_image", "image_url": "https://example.com/cat.png", "detail": "low"},
        {"type": "input_file", "file_id": "file-1"},
        {"type": "input_file", "file_url": "https://example.com/a.pdf"},
    ]


def test_a_conversation_with_tools_in_dicts() -> None:
    """Calls and their results become items; a custom tool's result has its own item type."""
    calls = [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "b", "type": "custom", "custom": {"name": "c", "input": "text"}},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "content": "One moment.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": ["1"]},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
    ]
    assert encode(messages)["input"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "One moment."},
        {"type": "function_call", "name": "f", "arguments": '{"x":1}', "call_id": "a"},
        {"type": "custom_tool_call", "name": "c", "input": "text", "call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "2"},
    ]


def test_reasoning_is_sent_back_with_its_call() -> None:
    """In the second turn of a tool loop the encrypted reasoning precedes the call; both are unchanged."""
    answer = decode(response(ENCRYPTED, CALL_F))
    assert (answer.finish_reason, answer.tool_calls[0].id) == ("tool_calls", "call_1")
    sent = encode([*HI, answer, {"role": "tool", "tool_call_id": "call_1", "content": "1"}])["input"]
    assert sent[1:] == [ENCRYPTED, CALL_F, {"type": "function_call_output", "call_id": "call_1", "output": "1"}]


def test_a_changed_answer_is_sent_without_its_reasoning() -> None:
    """Reasoning belongs to the unedited text and calls."""
    turn = normalise([*HI, decode(response(ENCRYPTED, message("4")))])
    turn[1]["content"] = "5"
    assert encode(list(turn))["input"][1:] == [{"role": "assistant", "content": "5"}]


def test_a_custom_call_is_answered_as_one() -> None:
    """The result of a custom tool's call gets the matching item type."""
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "c", "input": "x = 1"}
    answer = decode(response(call))
    assert (answer.tool_calls[0].name, answer.tool_calls[0].arguments) == ("c", "x = 1")
    sent = encode([*HI, answer, {"role": "tool", "tool_call_id": "c1", "content": "ok"}])["input"]
    assert sent[1:] == [call, {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"}]


def test_an_answer_with_everything() -> None:
    """An answer may have text, reasoning, calls, and usage with cached and reasoning tokens."""
    summary = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "Two and two."}]}
    usage = {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 17,
    }
    answer = decode(response(summary, message("The answer: ", "4", phase="final_answer"), CALL_F, usage=usage))
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("The answer: 4", "Two and two.", "tool_calls")
    assert (answer.id, answer.model, answer.request_id) == ("resp_1", "gpt-5", "req_1")
    found = answer.usage
    assert (found.input_tokens, found.cached_tokens, found.output_tokens, found.reasoning_tokens) == (10, 8, 7, 5)


def test_a_cost_in_ticks() -> None:
    """xAI states the cost in ticks: ten billion are a dollar."""
    usage = {"input_tokens": 218, "output_tokens": 410, "cost_in_usd_ticks": 10959000}
    assert decode(response(message("x"), usage=usage)).usage.cost == pytest.approx(0.0010959)


def test_no_usage_is_unknown_usage() -> None:
    """A missing usage is None, not 0."""
    assert decode(response(message("x"))).usage.input_tokens is None


@pytest.mark.parametrize(
    ("reason", "finish"), [("max_output_tokens", "length"), ("content_filter", "content_filter"), (None, "length")]
)
def test_incomplete_answers_say_why(reason: str | None, finish: str) -> None:
    """A truncated answer keeps its text and its finish reason shows why it was cut."""
    answer = decode(response(message("Half"), status="incomplete", incomplete_details={"reason": reason}))
    assert (answer.text, answer.finish_reason) == ("Half", finish)


def test_an_answer_cut_while_thinking() -> None:
    """The answer has no text, and its finish reason is the limit."""
    answer = decode(response(ENCRYPTED, status="incomplete", incomplete_details={"reason": "max_output_tokens"}))
    assert (answer.text, answer.finish_reason, answer.raw_finish_reason) == ("", "length", "max_output_tokens")


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (response(status="failed", error={"code": "server_error", "message": "Oops"}), ServerError, "Oops"),
        (response(status="failed", error={"code": "rate_limit_exceeded", "message": "m"}), RateLimitError, "m"),
        (response(status="failed", error={"code": "other_thing", "message": "m"}), ResponseError, "m"),
        (response(message("Half"), status="failed", error=None), EmptyResponseError, "output"),
        (response(status="cancelled"), ResponseError, "cancelled"),
        (response(status="queued"), ResponseError, "queued"),
        (response(message("Half"), status="in_progress"), ResponseError, "in_progress"),
        ({"error": {"message": "m", "type": "invalid_request_error"}}, BadRequestError, "m"),
        (response(), EmptyResponseError, "text"),
        (response(ENCRYPTED), EmptyResponseError, "text"),
        (response(message("")), EmptyResponseError, "text"),
        (response(message("x"), status="incomplete", incomplete_details={"reason": "odd"}), BrokenResponseError, "odd"),
        ({"id": "resp_1"}, EmptyResponseError, "output"),
        (response(message({"type": "refusal", "refusal": "I will not."})), ContentFilterError, "I will not."),
        (
            response(status="incomplete", incomplete_details={"reason": "content_filter"}),
            ContentFilterError,
            "filter",
        ),
        (b"", DecodeError, "nothing"),
        (b"<html>no</html>", DecodeError, "html"),
    ],
)  # fmt: skip
def test_a_200_that_is_an_error(body: Any, kind: type[LLMError], words: str) -> None:
    """Failed, cancelled, unfinished, empty, refused and filtered responses raise errors of their own classes."""
    with pytest.raises(kind, match=words) as caught:
        check_answer(decode(body), "openai")
    assert type(caught.value) is kind


def test_items_of_other_kinds_are_a_valid_answer() -> None:
    """A picture, or a search that waits for approval, is not an empty answer; its item is sent back."""
    picture = {"type": "image_generation_call", "id": "ig_1", "result": "AAAA", "status": "completed"}
    answer = decode(response(picture))
    check_answer(answer, "openai")
    assert (answer.text, answer.choices[0].message.other) == ("", ("image_generation_call",))
    assert encode([*HI, answer])["input"][1:] == [picture]


def test_a_damaged_item_is_skipped() -> None:
    """An item of another shape does not affect the others."""
    answer = decode(response(None, 7, {"type": 3}, {"type": "message", "content": 5}, message(None, 3, "x")))
    assert answer.text == "x"


DELTAS: list[dict[str, Any]] = [
    {"type": "response.created", "response": response(status="in_progress")},
    {"type": "response.output_item.added", "output_index": 0, "item": message(status="in_progress")},
    {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "He"},
    {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "llo"},
    {"type": "response.output_text.done", "output_index": 0, "content_index": 0, "text": "Hello"},
    {"type": "response.output_item.done", "output_index": 0, "item": message("Hello")},
]
COMPLETED = {"type": "response.completed", "response": response(message("Hello"), usage={"input_tokens": 3})}


def test_a_stream() -> None:
    """Deltas are the text; the last event has the whole answer with its usage."""
    deltas, whole = stream(events(*DELTAS, COMPLETED))
    assert (deltas, whole.text, whole.finish_reason, whole.usage.input_tokens) == (["He", "llo"], "Hello", "stop", 3)


def test_a_stream_whose_last_event_has_no_output() -> None:
    """ChatGPT's Codex backend leaves the output empty: the earlier items are the answer, and are sent back."""
    reasoned = {"type": "response.output_item.done", "output_index": 1, "item": ENCRYPTED}
    _, whole = stream(events(reasoned, *DELTAS, {**COMPLETED, "response": response()}))
    assert whole.text == "Hello"
    assert encode([*HI, whole])["input"][1:] == [message("Hello"), ENCRYPTED]


def test_a_stream_of_deltas_alone() -> None:
    """If a gateway sends neither items nor output, the deltas are the text."""
    _, whole = stream(events(*DELTAS[:5], {"type": "response.done", "response": response(usage={"input_tokens": 3})}))
    assert (whole.text, whole.finish_reason, whole.usage.input_tokens) == ("Hello", "stop", 3)


def test_a_stream_without_deltas() -> None:
    """A text that arrives in one event is one delta."""
    deltas, whole = stream(events(*DELTAS[:2], *DELTAS[4:], COMPLETED))
    assert (deltas, whole.text) == (["Hello"], "Hello")


def test_an_incomplete_stream() -> None:
    """A stream that ends at the limit has that finish reason."""
    end = response(message("Hello"), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    assert stream(events(*DELTAS, {"type": "response.incomplete", "response": end}))[1].finish_reason == "length"


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"type": "error", "code": "rate_limit_exceeded", "message": "m", "param": None}, RateLimitError),
        ({"type": "error", "error": {"type": "server_error", "message": "m"}}, ServerError),
        ({"type": "error", "message": "m"}, ResponseError),
        (
            {"type": "response.failed", "response": response(status="failed", error=SERVER_ERROR)},
            ServerError,
        ),
    ],
)  # fmt: skip
def test_an_error_inside_a_stream(event: dict[str, Any], kind: type[LLMError]) -> None:
    """An error event, or a failed response, raises the error that its code names."""
    with pytest.raises(kind, match="m") as caught:
        stream(events(*DELTAS, event))
    assert type(caught.value) is kind


def test_an_error_in_an_event_without_a_type() -> None:
    """A gateway's error may have neither type nor event name."""
    with pytest.raises(RateLimitError):
        stream(b'data: {"error": {"code": 429, "message": "slow down"}}\n\n')


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n", b'data: {"type": "response.comp'])
def test_a_stream_without_its_last_event_was_cut(end: bytes) -> None:
    """Text without the last event is not an answer: usage and finish reason are missing."""
    with pytest.raises(APIConnectionError):
        stream(events(*DELTAS) + end)


def test_a_server_that_ignores_stream() -> None:
    """A whole response to a stream request is the answer, without deltas."""
    deltas, whole = stream(json.dumps(response(message("Hello"))).encode())
    assert (deltas, whole.text) == ([], "Hello")


@pytest.mark.parametrize(
    ("base_url", "url"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1/responses"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1/responses"),
        ("https://gateway.example/v1?key=x", "https://gateway.example/v1/responses?key=x"),
    ],
)
def test_addresses(base_url: str, url: str) -> None:
    """The path is inserted before a query."""
    assert codec(base_url).encode(ChatCall(model="m", messages=normalise(HI))).url == url
