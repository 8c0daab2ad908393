"""Gemini's generateContent on AI Studio and Vertex: requests are encoded, answers are decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from aggregator.errors import ConfigError, ContentFilterError, DecodeError, EmptyResponseError, RateLimitError
from aggregator.llm.calls import ChatCall
from aggregator.llm.messages import Image, normalise
from aggregator.llm.names import resolve
from aggregator.records import Completion, HTTPReply, HTTPRequest

CALL = ChatCall(model="gemini-2.5-flash", messages=({"role": "user", "content": "Hi"},))
STUDIO = "https://generativelanguage.googleapis.com/v1beta/models"


def request(call: ChatCall) -> HTTPRequest:
    return resolve("gemini/gemini-2.5-flash", api_key="k", env={}).codec.encode(call)


def sent(messages: Any, model: str = "gemini-2.5-flash") -> Any:
    return json.loads(request(replace(CALL, model=model, messages=normalise(messages))).body)


def decode(answer: Any) -> Completion:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    codec = resolve("gemini/gemini", env={}).codec
    return codec.decode(HTTPReply(status=200, body=data, headers={}), CALL)


def answer(*parts: Any, finish: Any = "STOP", **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": list(parts)}, "finishReason": finish}], **more}


@pytest.mark.requirement("client 12: Gemini: the key in its header, not in the address")
def test_request() -> None:
    """The key is sent in a header, never in the URL, which a cassette would show."""
    made = request(CALL)
    assert made.url == f"{STUDIO}/gemini-2.5-flash:generateContent"
    assert made.headers["x-goog-api-key"] == "k"
    assert json.loads(made.body) == {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
    assert request(replace(CALL, stream=True)).url == f"{STUDIO}/gemini-2.5-flash:streamGenerateContent?alt=sse"


@pytest.mark.requirement("built 3: options and tools")
def test_options() -> None:
    """Options are sent under this API's names."""
    schema = {"type": "object", "properties": {}}
    call = replace(
        CALL,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        n=2,
        stop=("a", "b"),
        tools=({"type": "function", "function": {"name": "f", "parameters": schema}}, {"googleSearch": {}}),
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        extra={"safetySettings": []},
    )
    assert json.loads(request(call).body) == {
        "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        "tools": [{"functionDeclarations": [{"name": "f", "parametersJsonSchema": schema}]}, {"googleSearch": {}}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
        "generationConfig": {
            "maxOutputTokens": 9,
            "temperature": 0.5,
            "topP": 0.9,
            "candidateCount": 2,
            "seed": 3,
            "stopSequences": ["a", "b"],
            "responseMimeType": "application/json",
            "responseJsonSchema": schema,
        },
        "safetySettings": [],
    }


def test_plain_json_without_a_schema() -> None:
    """json_object sets the mime type only."""
    config = json.loads(request(replace(CALL, response_format={"type": "json_object"})).body)["generationConfig"]
    assert config == {"responseMimeType": "application/json"}


def test_extra_adds_to_the_generation_config() -> None:
    """A thinking budget in `extra` does not replace max_tokens."""
    call = replace(CALL, max_tokens=9, extra={"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}})
    config = json.loads(request(call).body)["generationConfig"]
    assert config == {"maxOutputTokens": 9, "thinkingConfig": {"thinkingBudget": 0}}


@pytest.mark.requirement("built 3: text and images")
def test_messages() -> None:
    """System text is separate; images are sent as bytes or by address."""
    png = Image(b"\x89PNG1")
    body = sent(
        [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": ["Look", png, Image("https://x/y.webp?z=1"),
                {"fileData": {"fileUri": "gs://a"}, "type": "file"}]},
            {"role": "assistant", "content": "A cat"},
        ]
    )  # fmt: skip
    assert body["systemInstruction"] == {"parts": [{"text": "Be brief"}]}
    assert body["contents"] == [
        {
            "role": "user",
            "parts": [
                {"text": "Look"},
                {"inlineData": {"mimeType": "image/png", "data": "iVBORzE="}},
                {"fileData": {"fileUri": "https://x/y.webp?z=1", "mimeType": "image/webp"}},
                {"fileData": {"fileUri": "gs://a"}},
            ],
        },
        {"role": "model", "parts": [{"text": "A cat"}]},
    ]


def test_a_turn_with_tools() -> None:
    """A result names its function and is sent as an object; the results of one turn share one content."""
    calls = [
        {"id": i, "type": "function", "function": {"name": f, "arguments": "{}"}} for i, f in (("a", "f"), ("b", "g"))
    ]
    contents = sent(
        [
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": '{"x": 1}'},
            {"role": "tool", "tool_call_id": "b", "content": "sunny"},
        ]
    )["contents"]
    assert contents[0]["parts"] == [
        {"functionCall": {"name": "f", "args": {}}},
        {"functionCall": {"name": "g", "args": {}}},
    ]
    assert contents[1]["parts"] == [
        {"functionResponse": {"name": "f", "response": {"x": 1}}},
        {"functionResponse": {"name": "g", "response": {"result": "sunny"}}},
    ]


@pytest.mark.requirement("built 3: an answer continues its conversation")
def test_a_call_is_sent_back_with_its_signature() -> None:
    """From Gemini 3 on a call without its signature is refused: ours is kept, a missing one gets the placeholder."""
    found = decode(answer({"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "sig"}))
    part = sent(["Hi", found])["contents"][1]["parts"][0]
    assert part == {"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "sig"}
    other = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert sent([other], "gemini-3-flash")["contents"][0]["parts"][0]["thoughtSignature"]


@pytest.mark.requirement("client 6: unknown keys and blocks", "client 6: thinking is no part of the text")
def test_parts() -> None:
    """Text parts are joined, thoughts are separate, other kinds are skipped."""
    found = decode(
        answer(
            {"text": "hm", "thought": True},
            {"text": "He"},
            {"executableCode": {"code": "1", "language": "PYTHON"}},
            {"inlineData": {"mimeType": "image/png", "data": "AAAA"}},
            {"text": "llo", "thoughtSignature": "s"},
            {"functionCall": {"name": "f", "args": {"x": 1}}},
            {"functionCall": {"id": "own", "name": "g"}},
            modelVersion="g",
            responseId="r",
        )
    )
    assert (found.text, found.reasoning, found.model, found.id) == ("Hello", "hm", "g", "r")
    assert [(c.id, c.name, c.arguments) for c in found.tool_calls] == [("call_0", "f", '{"x":1}'), ("own", "g", "{}")]


@pytest.mark.requirement("client 6: unknown finish reasons", "client 9: always visible")
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("MODEL_ARMOR", "content_filter"),
        ("PROHIBITED_CONTENT", "content_filter"),
        ("UNEXPECTED_TOOL_CALL", "error"),
        (1, "stop"),
        (2, "length"),
        (3, "content_filter"),
        (99, "error"),
        (None, "stop"),
    ],
)
def test_finish_reasons(word: Any, reason: str) -> None:
    """Finish reasons, and Vertex's numbers, are mapped to OpenAI's four."""
    assert decode(answer({"text": "x"}, finish=word)).finish_reason == reason


@pytest.mark.parametrize(
    "candidate",
    [
        {"content": {"role": "model"}, "finishReason": "MAX_TOKENS"},
        {"content": {}, "finishReason": "SAFETY"},
        {"finishReason": "MAX_TOKENS"},
        {"content": {"parts": None}, "finishReason": "STOP"},
    ],
)
def test_a_candidate_without_parts(candidate: Any) -> None:
    """A model cut while thinking, or filtered, returns no text; the finish reason explains why."""
    found = decode({"candidates": [candidate]})
    assert (found.text, found.raw_finish_reason) == ("", candidate["finishReason"])


@pytest.mark.requirement("client 11: input, output, reasoning, cached; None is not 0")
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {"promptTokenCount": 5, "candidatesTokenCount": 2, "thoughtsTokenCount": 3, "cachedContentTokenCount": 4},
            (5, 5, 4, 3),
        ),
        ({"promptTokenCount": 5}, (5, None, None, None)),
        ({"promptTokenCount": 5, "thoughtsTokenCount": 3}, (5, 3, None, 3)),
        ({}, (None, None, None, None)),
    ],
)
def test_usage(usage: Any, expected: tuple[int | None, ...]) -> None:
    """Thinking tokens count in the output; a missing count is None."""
    found = decode(answer({"text": "x"}, usageMetadata=usage)).usage
    assert (found.input_tokens, found.output_tokens, found.cached_tokens, found.reasoning_tokens) == expected


@pytest.mark.requirement("client 7: no candidates, a blocked prompt")
@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"promptFeedback": {"blockReason": "SAFETY"}}, ContentFilterError),
        ({"candidates": []}, EmptyResponseError),
        ({"usageMetadata": {}}, EmptyResponseError),
        ({"candidates": [{}]}, EmptyResponseError),
        ({"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}, RateLimitError),
        (b"", DecodeError),
    ],
)
def test_a_200_that_is_an_error(raw: Any, kind: type[Exception]) -> None:
    """A blocked prompt has status 200 and no candidates: that is an error."""
    with pytest.raises(kind) as caught:
        decode(raw)
    assert type(caught.value) is kind


PROJECT = {"GOOGLE_CLOUD_PROJECT": "p"}


@pytest.mark.parametrize(
    ("given", "env", "url", "header"),
    [
        ({"api_key": "ya29.t"}, PROJECT,
            "aiplatform.googleapis.com/v1/projects/p/locations/global/publishers/google", "authorization"),
        ({"api_key": "ya29.t"}, {**PROJECT, "GOOGLE_CLOUD_LOCATION": "us-east1"},
            "us-east1-aiplatform.googleapis.com/v1/projects/p/locations/us-east1/publishers/google", "authorization"),
        ({}, {**PROJECT, "GOOGLE_OAUTH_ACCESS_TOKEN": "t"},
            "aiplatform.googleapis.com/v1/projects/p/locations/global/publishers/google", "authorization"),
        ({"api_key": "AIzaKey"}, {}, "aiplatform.googleapis.com/v1/publishers/google", "x-goog-api-key"),
        ({}, {"GOOGLE_API_KEY": "AIzaKey"}, "aiplatform.googleapis.com/v1/publishers/google", "x-goog-api-key"),
    ],
)  # fmt: skip
def test_vertex_addresses(given: Any, env: dict[str, str], url: str, header: str) -> None:
    """With an access token the URL has project and location; with an API key it has neither."""
    made = resolve("vertex_ai/gemini-2.5-flash", env=env, **given).codec.encode(CALL)
    assert made.url == f"https://{url}/models/gemini-2.5-flash:generateContent"
    assert made.headers[header]


def test_vertex_without_a_project() -> None:
    """The error names the variable to set."""
    with pytest.raises(ConfigError, match="GOOGLE_CLOUD_PROJECT"):
        resolve("vertex/gemini-2.5-flash", api_key="ya29.t", env={})


def test_results_of_the_providers_tools_were_not_counted() -> None:
    """toolUsePromptTokenCount is added to the input; the rest of the total is output."""
    usage = {
        "promptTokenCount": 151,
        "candidatesTokenCount": 1089,
        "thoughtsTokenCount": 1120,
        "toolUsePromptTokenCount": 18329,
        "totalTokenCount": 20689,
    }
    body = {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}], "usageMetadata": usage}
    codec = resolve("gemini/gemini-3-flash", api_key="k", env={}).codec
    call = ChatCall(model="gemini-3-flash", messages=({"role": "user", "content": "q"},))
    found = codec.decode(HTTPReply(status=200, body=json.dumps(body).encode(), headers={}), call).usage
    assert (found.input_tokens, found.output_tokens, found.total_tokens) == (18480, 2209, 20689)
