"""Bedrock's Converse: requests, answers, and streams in binary frames."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from bedrock_frames import frame, packed
from hypothesis import given
from hypothesis import strategies as st
from llm_fakes import QUESTION, ScriptedTransport, failure

from aggregator import LLM, Budget, Price, cassette
from aggregator.errors import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    DecodeError,
    EmptyResponseError,
    LLMError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)
from aggregator.llm.calls import ChatCall, Codec
from aggregator.llm.codecs.bedrock import FrameParser
from aggregator.llm.messages import Image, normalise
from aggregator.llm.names import resolve
from aggregator.records import Completion, HTTPReply

ENV = {"AWS_REGION": "eu-central-1", "AWS_BEARER_TOKEN_BEDROCK": "bedrock-api-key-test"}
MODEL = "eu.anthropic.claude-sonnet-4-5-20250929-v1:0"
PNG = b"\x89PNG\r\n\x1a\n"
USE = {"toolUse": {"toolUseId": "t1", "name": "f", "input": {"x": 1}}}
THOUGHT = {"reasoningContent": {"reasoningText": {"text": "hm", "signature": "s"}}}


def codec() -> Codec:
    return resolve(f"bedrock/{MODEL}", env=ENV).codec


def encode(messages: Any = "Hi", **options: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        codec().encode(ChatCall(model=MODEL, messages=normalise(messages), **options)).body
    )
    return body


def answer(*content: Any, stop: str = "end_turn", **usage: int) -> dict[str, Any]:
    counts = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15, **usage}
    message = {"role": "assistant", "content": list(content)}
    return {"output": {"message": message}, "stopReason": stop, "usage": counts, "metrics": {"latencyMs": 7}}


def reply(body: Any, status: int = 200, **headers: str) -> HTTPReply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTPReply(status=status, body=data, headers={name.replace("_", "-"): v for name, v in headers.items()})


def decode(body: Any) -> Completion:
    return codec().decode(reply(body), ChatCall(model=MODEL, messages=normalise("Hi")))


def stream(body: bytes, step: int = 0) -> tuple[list[str], Completion]:
    reader = codec().stream(ChatCall(model=MODEL, messages=normalise("Hi"), stream=True))
    pieces = [body[i : i + step] for i in range(0, len(body), step)] if step else [body]
    deltas = [text for piece in pieces for text in reader.feed(piece)]
    return deltas, reader.finish(reply(body))


def test_address_and_key() -> None:
    """The region is in the host, the model in the path, the key in a bearer header."""
    request = codec().encode(ChatCall(model=MODEL, messages=normalise("Hi")))
    assert request.url == (
        "https://bedrock-runtime.eu-central-1.amazonaws.com/model/"
        "eu.anthropic.claude-sonnet-4-5-20250929-v1%3A0/converse"
    )
    assert request.headers["authorization"] == "Bearer bedrock-api-key-test"
    assert json.loads(request.body) == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}


def test_the_slashes_of_an_arn_are_escaped() -> None:
    """An inference profile's ARN is one part of the path."""
    arn = "arn:aws:bedrock:eu-central-1:123456789012:inference-profile/eu.amazon.nova-lite-v1:0"
    url = (
        resolve(f"bedrock/{arn}", env=ENV).codec.encode(ChatCall(model=arn, messages=normalise("Hi"), stream=True)).url
    )
    assert url.endswith("inference-profile%2Feu.amazon.nova-lite-v1%3A0/converse-stream")


def test_there_is_no_default_region() -> None:
    """Without a region, or a base_url, the call is refused, so that prompts go to no unintended region."""
    with pytest.raises(ConfigError, match="AWS_REGION"):
        LLM("bedrock/m", env={"AWS_BEARER_TOKEN_BEDROCK": "k"})
    assert resolve("bedrock/m", base_url="https://b.example", env={}).base_url == "https://b.example"


def test_options() -> None:
    """Limits, sampling, tools, tool choice and schema are converted; the user's own fields come last."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = encode(
        max_tokens=50,
        temperature=0.1,
        top_p=0.5,
        stop="END",
        tools=(tool, {"systemTool": {"name": "nova_grounding"}}),
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format=wanted,
        extra={"additionalModelRequestFields": {"top_k": 5}},
    )
    assert body["inferenceConfig"] == {"maxTokens": 50, "temperature": 0.1, "topP": 0.5, "stopSequences": ["END"]}
    assert body["toolConfig"] == {
        "tools": [
            {"toolSpec": {"name": "f", "description": "d", "inputSchema": {"json": schema}}},
            {"systemTool": {"name": "nova_grounding"}},
        ],
        "toolChoice": {"tool": {"name": "f"}},
    }
    text = {"type": "json_schema", "structure": {"jsonSchema": {"name": "n", "schema": json.dumps(schema)}}}
    assert json.loads(body["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"]) == schema
    assert body["outputConfig"]["textFormat"].keys() == text.keys()
    assert body["additionalModelRequestFields"] == {"top_k": 5}


@pytest.mark.parametrize("option", [{"seed": 1}, {"n": 2}, {"tools": (), "tool_choice": "none"}])
def test_unsupported_options_are_refused(option: dict[str, Any]) -> None:
    """An option without a field raises; it is not dropped silently."""
    with pytest.raises(ConfigError, match="bedrock"):
        encode(**option)


def test_messages() -> None:
    """System prompts are separate, turns of one role merged, images bytes, tool results in the user's turn."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["Look", Image(PNG), ""]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "t1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": ""},
        {"role": "user", "content": [{"type": "document", "document": {"name": "d"}}]},
    ]
    body = encode(messages)
    assert body["system"] == [{"text": "Be brief."}]
    assert body["messages"] == [
        {
            "role": "user",
            "content": [{"text": "Look"}, {"image": {"format": "png", "source": {"bytes": "iVBORw0KGgo="}}}],
        },
        {"role": "assistant", "content": [{"toolUse": {"toolUseId": "t1", "name": "f", "input": {}}}]},
        {
            "role": "user",
            "content": [{"toolResult": {"toolUseId": "t1", "content": [{"text": " "}]}}, {"document": {"name": "d"}}],
        },
    ]


def test_cache_marks_become_cache_points() -> None:
    """A part with Anthropic's cache mark is followed by this API's cache point."""
    part = {"type": "text", "text": "long", "cache_control": {"type": "ephemeral"}}
    assert encode([{"role": "user", "content": [part, "short"]}])["messages"][0]["content"] == [
        {"text": "long"},
        {"cachePoint": {"type": "default"}},
        {"text": "short"},
    ]


@pytest.mark.parametrize("part", [Image("https://example.com/cat.png"), {"type": "input_audio", "data": "x"}])
def test_unsupported_parts_are_refused(part: Any) -> None:
    """Bedrock fetches no URL; the error says what to give instead."""
    with pytest.raises(ConfigError, match=r"messages\[0\]"):
        encode([{"role": "user", "content": [part]}])


def test_an_answer_with_everything() -> None:
    """An answer may have text, citations, thinking, calls, and usage with cache reads and writes."""
    cited = {"citationsContent": {"content": [{"text": " [1]"}], "citations": []}}
    found = decode(
        answer(THOUGHT, {"text": "Four"}, cited, USE, stop="tool_use", cacheReadInputTokens=3, cacheWriteInputTokens=2)
    )
    assert (found.text, found.reasoning, found.finish_reason) == ("Four [1]", "hm", "tool_calls")
    assert [(call.id, call.name, json.loads(call.arguments)) for call in found.tool_calls] == [("t1", "f", {"x": 1})]
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.cached_tokens) == (15, 5, 3)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("tool_use", "tool_calls"),
        ("model_context_window_exceeded", "length"), ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"), ("malformed_model_output", "error"), ("malformed_tool_use", "error"),
    ],
)  # fmt: skip
def test_finish_reasons(word: str, reason: str) -> None:
    """AWS's finish reasons for broken answers are errors."""
    assert decode(answer({"text": "x"}, stop=word)).finish_reason == reason


@pytest.mark.parametrize(
    "hidden", [THOUGHT, {"reasoningContent": {"redactedContent": "QUJD"}}, {"video": {"format": "mp4"}}]
)
def test_signed_thinking_is_sent_back_unchanged(hidden: dict[str, Any]) -> None:
    """Blocks other than text and calls keep their places, unless the text was changed."""
    found = decode(answer(hidden, {"text": "Four"}, USE))
    assert encode(["Hi", found, "Go on."])["messages"][1]["content"] == [hidden, {"text": "Four"}, USE]


@pytest.mark.parametrize(
    "body", [{}, {"output": {}}, {"output": {"message": {"role": "assistant"}}}, {"message": "no"}]
)
def test_an_answer_without_content_is_an_error(body: dict[str, Any]) -> None:
    """Status 200 without content is an error."""
    with pytest.raises(EmptyResponseError):
        decode(body)


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (400, {"message": "Input is too long for requested model."}, ContextLengthError, None),
        (403, {"Message": "Bearer Token has expired"}, PermissionDeniedError, None),
        (400, {"message": "The provided model identifier is invalid."}, BadRequestError, None),
        (404, {"__type": "ResourceNotFoundException", "message": "m"}, NotFoundError, "ResourceNotFoundException"),
        (429, {"__type": "ThrottlingException", "message": "Rate exceeded"}, RateLimitError, "ThrottlingException"),
        (424, {"message": "The model failed"}, ServerError, None),
        (503, b"", ServerError, None),
        (500, b"<html>no</html>", ServerError, None),
    ],
)  # fmt: skip
def test_error_statuses(status: int, body: Any, kind: type[APIStatusError], code: str | None) -> None:
    """The class follows from the status, or from the message if that is more specific; the code is AWS's own."""
    error = codec().error(reply(body, status))
    assert (type(error), error.code) == (kind, code)
    assert error.message


def test_the_error_code_in_a_header() -> None:
    """AWS names the error in a header, followed by a colon and a URL."""
    found = reply({"message": "m"}, 429, x_amzn_errortype="ThrottlingException:http://internal/", x_amzn_requestid="r1")
    error = codec().error(found)
    assert (error.code, error.request_id) == ("ThrottlingException", "r1")


THROTTLED = {":error-code": "throttlingException", ":error-message": "slow down"}
STREAM = [
    frame("messageStart", {"role": "assistant", "p": "abc"}),
    frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "h"}}}),
    frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "m"}}}),
    frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "s"}}}),
    frame("contentBlockStop", {"contentBlockIndex": 0}),
    frame("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"text": "Fo"}}),
    frame("contentBlockDelta", {"contentBlockIndex": 1, "delta": {"text": "ur"}}),
    frame("contentBlockStart", {"contentBlockIndex": 2, "start": {"toolUse": {"toolUseId": "t1", "name": "f"}}}),
    frame("contentBlockDelta", {"contentBlockIndex": 2, "delta": {"toolUse": {"input": '{"x"'}}}),
    frame("contentBlockDelta", {"contentBlockIndex": 2, "delta": {"toolUse": {"input": ": 1}"}}}),
    frame("messageStop", {"stopReason": "tool_use"}),
    frame("metadata", {"usage": {"inputTokens": 10, "outputTokens": 5}, "metrics": {}}),
]


@pytest.mark.parametrize("step", [0, 1, 13])
def test_a_stream_cut_anywhere_into_pieces(step: int) -> None:
    """Deltas are the text; the whole answer has thinking, calls and usage, and can be sent back."""
    deltas, whole = stream(b"".join(STREAM), step)
    assert (deltas, whole.text, whole.reasoning, whole.finish_reason) == (["Fo", "ur"], "Four", "hm", "tool_calls")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (10, 5)
    assert encode(["Hi", whole])["messages"][1]["content"] == [THOUGHT, {"text": "Four"}, USE]


def test_a_stream_in_one_piece() -> None:
    """A recorded stream can be decoded as one body."""
    assert decode(b"".join(STREAM)) == stream(b"".join(STREAM))[1]


@pytest.mark.parametrize("end", range(len(STREAM) - 1))
def test_a_stream_that_was_cut(end: int) -> None:
    """A stream without its last event is a lost connection, even if it was cut within a frame."""
    for body in (b"".join(STREAM[:end]), b"".join(STREAM[: end + 1])[:-3]):
        if end == 10 and not body.endswith(STREAM[9]):
            continue
        with pytest.raises(LLMError) as caught:
            stream(body)
        assert isinstance(caught.value, APIConnectionError | DecodeError)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (frame("throttlingException", {"message": "slow down"}, message_type="exception"), RateLimitError),
        (frame("serviceUnavailableException", {"message": "slow down"}, message_type="exception"), ServerError),
        (frame("internalServerException", {"message": "slow down"}, message_type="exception"), ServerError),
        (frame("modelStreamErrorException", {"message": "slow down"}, message_type="exception"), ServerError),
        (frame("x", b"", message_type="error", **THROTTLED), RateLimitError),
    ],
)  # fmt: skip
def test_an_exception_inside_a_stream(last: bytes, kind: type[LLMError]) -> None:
    """An exception frame raises the error that it names."""
    with pytest.raises(kind, match="slow down"):
        stream(b"".join([*STREAM[:6], last]))


def test_a_frame_with_a_wrong_checksum() -> None:
    """A changed byte is detected, and none of the frame's text is used."""
    damaged = bytearray(b"".join(STREAM))
    damaged[len(STREAM[0]) + 100] ^= 1
    with pytest.raises(DecodeError, match="frame"):
        stream(bytes(damaged))


def test_an_error_page_instead_of_a_stream() -> None:
    """JSON or HTML instead of frames is read as a whole body."""
    assert stream(json.dumps(answer({"text": "x"})).encode())[1].text == "x"
    with pytest.raises(DecodeError):
        stream(b"<html>no</html>")


def test_frame_headers_of_every_type() -> None:
    """Header values of other types are skipped by their length."""
    kinds = {
        0: b"",
        1: b"",
        2: b"1",
        3: b"12",
        4: b"1234",
        5: b"12345678",
        8: b"12345678",
        9: b"1" * 16,
        6: b"\x00\x02ab",
    }
    headers = b"".join(struct.pack("!B", 1) + b"h" + bytes([kind]) + value for kind, value in kinds.items())
    text = struct.pack("!B", 11) + b":event-type" + b"\x07\x00\x04name"
    assert FrameParser().feed(packed(headers + text, b"{}")) == [("name", b"{}")]


@given(st.binary(max_size=60), st.binary(max_size=20))
def test_frames_of_any_headers_and_bytes(headers: bytes, rest: bytes) -> None:
    """Any frame with valid checksums gives an event or a DecodeError."""
    parser = FrameParser()
    try:
        assert len(parser.feed(packed(headers, b"{}"))) == 1
        parser.feed(rest)
    except DecodeError:
        return


async def test_a_stream_is_recorded_and_replayed(tmp_path: Path) -> None:
    """Binary frames are recorded and replayed exactly, without the key."""
    path = tmp_path / "bedrock.yaml"
    body = HTTPReply(status=200, body=b"".join(STREAM), headers={"content-type": "application/vnd.amazon.eventstream"})

    async def read(*steps: HTTPReply) -> tuple[list[str], Any]:
        transport = ScriptedTransport(*steps)
        found = LLM(f"bedrock/{MODEL}", env=ENV, transport=transport).stream(QUESTION)
        return [delta async for delta in found], found.completion.usage

    with cassette(path, "once"):
        recorded = await read(body)
    with cassette(path, "none"):
        assert await read(failure(500)) == recorded
    assert b"bedrock-api-key-test" not in path.read_bytes()


async def test_a_budget_sends_the_limit_of_this_api() -> None:
    """The assumed limit is sent as maxTokens, so no answer costs more than was reserved."""
    transport = ScriptedTransport(reply(answer({"text": "x"})))
    prices = {MODEL: Price(input=3, output=15)}
    llm = LLM(f"bedrock/{MODEL}", env=ENV, transport=transport, budget=Budget(usd=1), prices=prices)
    found = await llm.complete(QUESTION)
    assert transport.bodies()[0]["inferenceConfig"] == {"maxTokens": 4096}
    assert found.usage.cost == pytest.approx((10 * 3 + 5 * 15) / 1e6)
