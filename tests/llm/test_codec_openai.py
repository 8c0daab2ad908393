"""Chat completions: requests, and every shape of answer."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from aggregator.errors import (
    ContentFilterError,
    DecodeError,
    EmptyResponseError,
    RateLimitError,
    ResponseError,
    ServerError,
)
from aggregator.llm.calls import ChatCall, Codec
from aggregator.llm.names import resolve
from aggregator.records import Completion, HTTPReply

CALL = ChatCall(model="gpt-4o-mini", messages=({"role": "user", "content": "Hi"},))


def codec(model: str = "openai/gpt-4o-mini", **given: Any) -> Codec:
    return resolve(model, api_key="sk-test", env={}, **given).codec


def sent(call: ChatCall, model: str = "openai/gpt-4o-mini", **given: Any) -> Any:
    return json.loads(codec(model, **given).encode(call).body)


def reply(body: Any, **headers: str) -> HTTPReply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTPReply(status=200, body=data, headers={k.replace("_", "-"): v for k, v in headers.items()})


def answer(message: Any = None, finish: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more}


def decode(body: Any, **headers: str) -> Completion:
    return codec().decode(reply(body, **headers), CALL)


@pytest.mark.requirement("client 1: only encodings that can be decoded", "client 12: OpenAI-compatible")
def test_a_request_holds_only_what_was_given() -> None:
    """An option that is None is not sent; the URL is absolute, the content type explicit, the encodings decodable."""
    request = codec().encode(CALL)
    assert request.url == "https://api.openai.com/v1/chat/completions"
    assert request.body == b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hi"}]}'
    assert request.headers["content-type"] == "application/json"
    assert set(request.headers["accept-encoding"].split(", ")) <= {"gzip", "deflate"}
    assert request.headers["authorization"] == "Bearer sk-test"
    assert request.secrets == ("sk-test",)


@pytest.mark.requirement("built 3: options and tools")
def test_every_option_has_its_field() -> None:
    """All options of a call reach the body, `extra` last."""
    call = replace(
        CALL,
        max_tokens=5,
        temperature=0.0,
        top_p=0.5,
        seed=0,
        stop=("a", "b"),
        n=2,
        response_format={"type": "json_object"},
        tools=({"type": "function", "function": {"name": "f"}},),
        tool_choice="auto",
        stream=True,
        extra={"logprobs": True, "temperature": 1},
    )
    assert sent(call) == {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "temperature": 1,
        "top_p": 0.5,
        "seed": 0,
        "stop": ["a", "b"],
        "n": 2,
        "response_format": {"type": "json_object"},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
    }


def test_same_call_same_bytes() -> None:
    """The body depends on the call alone: cassettes and caches rely on it."""
    assert codec().encode(CALL) == codec().encode(msgspec.structs.replace(CALL))


@pytest.mark.requirement("client 14: max_completion_tokens for reasoning models of OpenAI and Azure alone")
@pytest.mark.parametrize(
    ("model", "base_url", "field"),
    [
        ("openai/gpt-4o-mini", None, "max_tokens"),
        ("openai/o3-mini", None, "max_completion_tokens"),
        ("openai/gpt-5-mini", None, "max_completion_tokens"),
        ("openai/gpt-5-mini", "http://127.0.0.1:9/v1", "max_completion_tokens"),
        ("openai-compatible/gpt-5-mini", "http://127.0.0.1:9/v1", "max_completion_tokens"),
        ("litellm-proxy/openai/o3", None, "max_completion_tokens"),
        ("openai-compatible/qwen3:8b", "http://127.0.0.1:9/v1", "max_tokens"),
        ("openrouter/openai/o3", None, "max_tokens"),
        ("azure/gpt-35-turbo", "https://x.openai.azure.com", "max_tokens"),
        ("azure/gpt-4o", "https://x.openai.azure.com", "max_tokens"),
        ("azure/o4-mini", "https://x.openai.azure.com", "max_completion_tokens"),
    ],
)
def test_the_limit_is_sent_under_the_name_that_the_server_knows(model: str, base_url: str | None, field: str) -> None:
    """`max_completion_tokens` is sent to OpenAI's reasoning models, also behind gateways; other servers ignore it."""
    bare = model.split("/", 1)[1]
    body = sent(replace(CALL, model=bare, max_tokens=7), model, base_url=base_url)
    assert {name: body.get(name) for name in ("max_tokens", "max_completion_tokens") if name in body} == {field: 7}


@pytest.mark.requirement("client 14: a cap where a server would go on to the end of its context")
def test_local_servers_get_a_default_limit() -> None:
    """Without one, a llama.cpp server generates to the end of its context."""
    assert sent(CALL, "llamacpp/tiny")["max_tokens"] == 4096
    assert "max_tokens" not in sent(CALL)


def test_mistral_has_its_own_names() -> None:
    """Mistral names the seed `random_seed` and refuses `stream_options`."""
    body = sent(replace(CALL, seed=3, stream=True), "mistral/mistral-small")
    assert body["random_seed"] == 3
    assert "seed" not in body
    assert "stream_options" not in body


@pytest.mark.requirement("client 6: content is text, parts, object, null or absent")
@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Hi"}, "Hi"),
        ({"content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"content": ""}, ""),
        ({"content": {"title": "x"}}, '{"title":"x"}'),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"text": "a"}]}, "a"),
        ({"content": "<think>\nhm\n</think>\n\nHi"}, "Hi"),
        ({"content": "<think>cut"}, ""),
        ({"content": "Say <think> aloud"}, "Say <think> aloud"),
        ({"content": " <b>Hi</b>"}, " <b>Hi</b>"),
    ],
)  # fmt: skip
def test_text_of_every_content(message: Any, text: str) -> None:
    """Content may be text, null, absent, parts or an object; thinking is not part of the text."""
    assert decode(answer(message)).text == text


@pytest.mark.requirement("client 6: thinking is no part of the text")
@pytest.mark.parametrize(
    "message",
    [
        {"content": "4", "reasoning_content": "hm"},
        {"content": "4", "reasoning": "hm"},
        {"content": "4", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}, {"data": "…"}]},
        {"content": "<think>hm</think>4"},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "closed": True},
                {"text": "4"},
            ]
        },
        {"content": "4", "reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    ],
)
def test_reasoning_is_separate(message: Any) -> None:
    """Thinking under three names, in parts or in a tag is `reasoning`, never `text`."""
    found = decode(answer(message))
    assert (found.text, found.reasoning) == ("4", "hm")


@pytest.mark.requirement("client 6: unknown finish reasons", "client 9: always visible")
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("model_length", "length"),
        ("tool_calls", "tool_calls"),
        ("function_call", "tool_calls"),
        ("content_filter", "content_filter"),
        ("", "stop"),
        (None, "stop"),
        ("eos", "stop"),
        ("something new", "error"),
    ],
)
def test_finish_reasons(word: str | None, reason: str) -> None:
    """Each finish reason is mapped to one of OpenAI's four; the provider's own is kept too."""
    found = decode(answer({"content": "x"}, word))
    assert (found.finish_reason, found.raw_finish_reason) == (reason, word)


@pytest.mark.requirement("client 9: arguments that do not parse stay text")
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}, ("a", "f", "{}")),
        ({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"x": '}}]}, ("a", "f", '{"x": ')),
        ({"tool_calls": [{"id": None, "function": {"name": "f", "arguments": {"x": 1}}}]}, ("", "f", '{"x":1}')),
        ({"tool_calls": [{"id": "a", "type": "custom", "custom": {"name": "c", "input": "go"}}]}, ("a", "c", "go")),
        ({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": None}}]}, ("a", "f", "")),
        ({"tool_calls": None, "function_call": {"name": "f", "arguments": "{}"}}, ("", "f", "{}")),
    ],
)  # fmt: skip
def test_tool_calls_are_read(message: Any, expected: tuple[str, str, str]) -> None:
    """Arguments are the model's own text, even if they are not valid JSON; the legacy function_call counts."""
    (call,) = decode(answer({"content": None, **message}, "tool_calls")).tool_calls
    assert (call.id, call.name, call.arguments) == expected


@pytest.mark.parametrize(
    "message", [{"tool_calls": []}, {"tool_calls": None}, {"function_call": {"name": "", "arguments": ""}}]
)
def test_empty_tool_calls_are_none(message: Any) -> None:
    """An empty list, null, or Snowflake's empty function_call means no call."""
    assert decode(answer({"content": "x", **message})).tool_calls == ()


@pytest.mark.requirement("client 11: input, output, reasoning, cached; None is not 0", "client 11: the provider's cost")
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, (5, 2, None, None, None)),
        (None, (None, None, None, None, None)),
        ({"prompt_tokens": None, "completion_tokens": 0}, (None, 0, None, None, None)),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": None},
                "completion_tokens_details": {"reasoning_tokens": 1},
            },
            (5, 2, 4, 1, None),
        ),
        ({"prompt_tokens": 5, "completion_tokens": 2, "completion_tokens_details": None}, (5, 2, None, None, None)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_cache_hit_tokens": 3}, (5, 2, 3, None, None)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "cost": 0.25}, (5, 2, None, None, 0.25)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "cost": {"total_cost": 0.5}}, (5, 2, None, None, 0.5)),
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "total_time": 0.01, "prompt_time": 1e-3},
            (5, 2, None, None, None),
        ),
        ({"prompt_tokens": 5.0, "completion_tokens": "2"}, (5, 2, None, None, None)),
        ({"prompt_tokens": 5, "completion_tokens": "many"}, (5, None, None, None, None)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "reasoning_tokens": 1}, (5, 2, None, 1, None)),
    ],
)
def test_usage_in_every_shape(usage: Any, expected: tuple[Any, ...]) -> None:
    """Nulls, floats and objects among the counts are ignored; a missing count is None, never 0."""
    found = decode(answer({"content": "x"}, usage=usage)).usage
    ours = (found.input_tokens, found.output_tokens, found.cached_tokens, found.reasoning_tokens, found.cost)
    assert ours == expected


@pytest.mark.requirement("client 11: the provider's cost")
def test_venices_cost_is_at_the_top_of_the_answer() -> None:
    """`cost: {"usd": …}` next to `usage` is the cost."""
    assert decode(answer({"content": "x"}, cost={"usd": 0.001, "diem": 0})).usage.cost == 0.001


@pytest.mark.requirement("built 1: several choices")
def test_several_choices_keep_their_order_and_index() -> None:
    """`n` answers are `n` choices."""
    body = {"choices": [{"index": i, "message": {"content": str(i)}, "finish_reason": "stop"} for i in range(3)]}
    assert [(choice.index, choice.message.content) for choice in decode(body).choices] == [(0, "0"), (1, "1"), (2, "2")]


@pytest.mark.requirement("client 6: raw bytes are kept")
def test_refusal_and_identity() -> None:
    """A refusal is separate; id, model, request id and the raw bytes are kept."""
    body = answer({"content": None, "refusal": "no"}, id="c1", model="m")
    found = decode(body, x_request_id="req_1")
    assert (found.choices[0].message.refusal, found.id, found.model, found.request_id) == ("no", "c1", "m", "req_1")
    assert json.loads(found.raw) == body


@pytest.mark.requirement("client 6: every field may be absent or odd", "client 6: white space before the body")
@pytest.mark.parametrize(
    "body",
    [
        b"   \n\n  " + json.dumps(answer({"content": "x"})).encode(),
        b"\xef\xbb\xbf" + json.dumps(answer({"content": "x"})).encode(),
        json.dumps(answer({"content": "x"}, created=None, object=None, id=7, model=None)).encode(),
        b'{"choices": [{"message": {"content": "x"}, "logprobs": {"token_logprobs": [NaN]}}]}',
        b'{"choices": [null, {"message": {"content": "x", "tool_calls": "none"}}], "usage": []}',
        b'{"choices": [{"text": "x", "finish_reason": "stop"}]}',
        b'{"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}',
    ],
)
def test_odd_bodies_are_read(body: bytes) -> None:
    """Padding, a byte order mark, fields of other types and NaN are tolerated."""
    assert decode(body).text == "x"


def test_a_lone_surrogate_does_not_lose_the_answer() -> None:
    """If a server cuts an emoji in two, the answer is read with a replacement character."""
    assert decode(b'{"choices": [{"message": {"content": "a\\ud83d"}}]}').text == "a\ufffd"


@pytest.mark.requirement("client 7: an error, no choices, no message, no body, no JSON")
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", DecodeError),
        (b"<html><title>502</title></html>", DecodeError),
        (b'{"choices": [{"mess', DecodeError),
        (b"[]", DecodeError),
        (b'"text"', DecodeError),
        (b"null", DecodeError),
        (b"[" * 100_000, DecodeError),
        ({"choices": []}, EmptyResponseError),
        ({"choices": None}, EmptyResponseError),
        ({"id": "x"}, EmptyResponseError),
        ({"choices": [{"finish_reason": "stop"}]}, EmptyResponseError),
        ({"choices": [{"finish_reason": "content_filter", "content_filter_results": {}}]}, ContentFilterError),
        ({"error": {"message": "odd"}}, ResponseError),
        ({"error": "odd"}, ResponseError),
        ({"error": {"code": 429, "message": "slow down"}}, RateLimitError),
        ({"error": {"type": "server_error", "message": "oops"}}, ServerError),
        ({"choices": [{"error": {"code": 502, "message": "upstream"}, "message": {"content": ""}}]}, ServerError),
    ],
)
def test_a_200_that_is_an_error(body: Any, kind: type[Exception]) -> None:
    """Each of these bodies with status 200 is a typed error that describes the body."""
    with pytest.raises(kind) as caught:
        decode(body, x_request_id="req_1")
    assert type(caught.value) is kind
    assert str(caught.value)
    assert getattr(caught.value, "request_id", None) == "req_1"


def test_a_key_is_never_in_a_message() -> None:
    """A key that the server quotes is masked, so it reaches no log."""
    with pytest.raises(ResponseError) as caught:
        decode({"error": {"message": "bad key sk-test given"}})
    assert "sk-test" not in str(caught.value)


def test_a_target_does_not_show_its_key() -> None:
    """The key is not part of an endpoint's repr."""
    assert "sk-test" not in repr(resolve("openai/gpt-4o", api_key="sk-test", env={}))


def test_a_token_function_is_called_each_time() -> None:
    """A key may be a function, because tokens of Azure and Vertex expire."""
    tokens = iter(["one", "two"])
    bound = resolve("openai/gpt-4o", api_key=lambda: next(tokens), env={}).codec
    assert [bound.encode(CALL).headers["authorization"] for _ in range(2)] == ["Bearer one", "Bearer two"]


@pytest.mark.requirement("client 12: Azure: deployment, api-version, api-key")
@pytest.mark.parametrize(
    ("base_url", "version", "url"),
    [
        ("https://x.openai.azure.com/", "2024-10-21", "/openai/deployments/d/chat/completions?api-version=2024-10-21"),
        ("https://x.openai.azure.com", None, "/openai/v1/chat/completions"),
        ("https://x.openai.azure.com/openai/v1/", "2024-10-21", "/openai/v1/chat/completions"),
        ("https://x.openai.azure.com?api-version=1", None, "/openai/deployments/d/chat/completions?api-version=1"),
        (
            "https://x.openai.azure.com/openai/deployments/d",
            "v",
            "/openai/deployments/d/chat/completions?api-version=v",
        ),
        ("https://x.openai.azure.com/models", "v", "/models/chat/completions?api-version=v"),
    ],
)
def test_azure_addresses(base_url: str, version: str | None, url: str) -> None:
    """The base_url is a resource, a deployment or a models path, with or without an api-version."""
    env = {"OPENAI_API_VERSION": version} if version else {}
    request = resolve("azure/d", base_url=base_url, api_key="k", env=env).codec.encode(replace(CALL, model="d"))
    assert request.url == f"https://x.openai.azure.com{url}"
    assert request.headers["api-key"] == "k"
    assert "authorization" not in request.headers


def test_thinking_outside_the_output_was_free() -> None:
    """If the total is more than input and output, the rest is output: xAI counts thinking that way."""
    usage = {
        "prompt_tokens": 32,
        "completion_tokens": 9,
        "total_tokens": 135,
        "completion_tokens_details": {"reasoning_tokens": 94},
    }
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": usage}
    found = codec().decode(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}), CALL).usage
    assert (found.input_tokens, found.output_tokens, found.reasoning_tokens) == (32, 103, 94)
    usage["total_tokens"] = 3  # a total that is smaller does not change the parts
    found = codec().decode(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}), CALL).usage
    assert (found.input_tokens, found.output_tokens) == (32, 9)
