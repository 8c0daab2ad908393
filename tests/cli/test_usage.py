"""Model and tokens in every provider's format, in one answer and in a stream."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from aggregator.cassettes.exchanges import Exchange, Facts
from aggregator.cli._exchanges import model_of, usage_of
from aggregator.records import HTTPReply, HTTPRequest

DATA = Path(__file__).parents[3] / "shared/data/real_exchanges"
IN_OUT = {"input_tokens": 7, "output_tokens": 2}


def exchange(answer: Any, asked: Any = None, url: str = "https://api.example.com/v1", **headers: str) -> Exchange:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Exchange(
        request=HTTPRequest(url=url, body=json.dumps(asked or {}).encode(), headers={}),
        reply=HTTPReply(status=200, body=body, headers=named),
        facts=Facts(lineage=""),
    )


def sse(*events: Any) -> bytes:
    return "".join(f"event: x\ndata: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"


def frame(payload: Any) -> bytes:
    """Return one message of an AWS event stream."""
    data = json.dumps(payload).encode()
    head = b"\x0b:event-type\x07\x00\x05chunk"
    size = 16 + len(head) + len(data)
    return size.to_bytes(4, "big") + len(head).to_bytes(4, "big") + bytes(4) + head + data + bytes(4)


def packed(event: Any) -> bytes:
    return frame({"bytes": base64.b64encode(json.dumps(event).encode()).decode()})


ANSWERS: dict[str, Any] = {
    "chat": {"usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}},
    "chat, streamed": sse(
        {"choices": [{}], "usage": None}, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    ),
    "Groq, streamed": sse({"choices": []}, {"x_groq": {"usage": {"prompt_tokens": 7, "completion_tokens": 2}}}),
    "Responses": {"object": "response", "usage": {"input_tokens": 7, "output_tokens": 2, "total_tokens": 9}},
    "Responses, streamed": sse(
        {"type": "response.created", "response": {"usage": None}},
        {"type": "response.output_text.delta", "delta": "tokens"},
        {"type": "response.completed", "response": {"usage": {"input_tokens": 7, "output_tokens": 2}}},
    ),
    "Anthropic, cached": {"usage": {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 2}},
    "Anthropic, streamed": sse(
        {"type": "message_start", "message": {"usage": {"input_tokens": 7, "output_tokens": 1}}},
        {"type": "content_block_delta", "delta": {"text": "5 tokens"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    ),
    "Gemini": {"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 1, "thoughtsTokenCount": 1}},
    "Gemini, streamed": sse(
        {"usageMetadata": {"promptTokenCount": 7}},
        {"usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 2}},
    ),
    "Gemini, a list": [{"usageMetadata": {"promptTokenCount": 7}}, {"usageMetadata": {"candidatesTokenCount": 2}}],
    "Bedrock converse": {"output": {"message": {}}, "usage": {"inputTokens": 7, "outputTokens": 2, "totalTokens": 9}},
    "Bedrock, Titan": {"inputTextTokenCount": 7, "results": [{"tokenCount": 2, "outputText": "x"}]},
    "Bedrock, Llama": {"generation": "x", "prompt_token_count": 7, "generation_token_count": 2},
    "Cohere 2": {"message": {"content": []}, "usage": {"billed_units": {"input_tokens": 5}, "tokens": IN_OUT}},
    "Cohere 2, streamed": sse({"type": "message-end", "delta": {"usage": {"tokens": IN_OUT}}}),
    "Cohere 1": {"text": "x", "meta": {"api_version": {"version": "1"}, "billed_units": IN_OUT}},
    "Cohere 1, streamed": b'{"event_type":"text-generation","text":"x"}\n'
    + json.dumps({"event_type": "stream-end", "response": {"meta": {"tokens": IN_OUT}}}).encode()
    + b"\n",
    "Ollama": {"model": "llama3", "done": True, "prompt_eval_count": 7, "eval_count": 2},
    "Ollama, streamed": b'{"model":"llama3","done":false}\n{"done":true,"prompt_eval_count":7,"eval_count":2}\n',
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_tokens_are_read_in_every_providers_format(kind: str) -> None:
    """A stream's last count is used; cached tokens are part of the input, thinking of the output."""
    assert usage_of(exchange(ANSWERS[kind], content_type="application/json")) == IN_OUT


@pytest.mark.parametrize(
    "body",
    [
        frame({"contentBlockIndex": 0, "delta": {"text": "x"}})
        + frame({"usage": {"inputTokens": 7, "outputTokens": 2}}),
        packed({"type": "message_start", "message": {"usage": {"input_tokens": 7}}})
        + packed({"amazon-bedrock-invocationMetrics": {"inputTokenCount": 7, "outputTokenCount": 2}}),
        packed({"type": "message_start", "message": {"usage": IN_OUT}}) + b"\x00\x00\xff",
        packed({"usage": IN_OUT}) + frame({"bytes": "?"}) + frame([1]),
    ],
)
def test_tokens_of_an_event_stream_of_aws(body: bytes) -> None:
    """Converse states them in its metadata, `invoke` in events that wrap the model's own; cut events are skipped."""
    assert usage_of(exchange(body, content_type="application/vnd.amazon.eventstream")) == IN_OUT


def test_tokens_in_headers_and_of_embeddings() -> None:
    """Bedrock counts in headers for models that state nothing; an embedding has an input only."""
    headers = {"x_amzn_bedrock_input_token_count": "7", "x_amzn_bedrock_output_token_count": "2"}
    assert usage_of(exchange({"embedding": [0.1]}, **headers)) == IN_OUT
    assert usage_of(exchange({"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}})) == {"input_tokens": 7}
    assert usage_of(exchange({"data": [], "usage": {"total_tokens": 7}})) == {"input_tokens": 7}
    assert usage_of(exchange({"embeddings": [[0.1]], "prompt_eval_count": 7})) == {"input_tokens": 7}
    assert usage_of(exchange({"embeddings": {}, "meta": {"billed_units": {"input_tokens": 7}}})) == {"input_tokens": 7}


@pytest.mark.parametrize(
    "answer", [b"", b"oops", [], {}, {"usage": "none"}, {"usage": {"input_tokens": -1}}, b"[" * 9_999]
)
def test_unknown_tokens_are_not_zero(answer: Any) -> None:
    """No other exception is raised either."""
    assert usage_of(exchange(answer)) == {}


@pytest.mark.parametrize(
    ("given", "model"),
    [
        (exchange({}, {"model": "gpt-5"}), "gpt-5"),
        (exchange({}, {"modelId": "amazon.nova"}), "amazon.nova"),
        (
            exchange({}, url="https://x/model/anthropic.claude-3-5-sonnet-20240620-v1%3A0/converse"),
            "anthropic.claude-3-5-sonnet-20240620-v1:0",
        ),
        (
            exchange({}, url="https://x/model/us.amazon.nova-lite-v1:0/invoke-with-response-stream"),
            "us.amazon.nova-lite-v1:0",
        ),
        (
            exchange({}, url="https://x/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"),
            "gemini-2.5-flash",
        ),
        (exchange({}, url="https://x/v1/projects/p/publishers/google/models/gemini-2:generateContent"), "gemini-2"),
        (exchange({}, url="https://x/openai/deployments/my-gpt/chat/completions?api-version=1"), "my-gpt"),
        (exchange({"model": "answered"}), "answered"),
        (exchange(sse({"type": "response.created", "response": {"model": "gpt-5", "usage": None}})), "gpt-5"),
        (exchange(sse({"type": "message_start", "message": {"model": "claude", "usage": {}}})), "claude"),
        (exchange({}), ""),
    ],
)
def test_the_model_is_read_from_any_place(given: Exchange, model: str) -> None:
    """It may be in the body, in the address, or in the answer."""
    assert model_of(given) == model


@pytest.mark.skipif(not DATA.exists(), reason="needs the recordings in ../shared/data/real_exchanges")
@pytest.mark.parametrize("name", ["anthropic", "gemini", "openai_compatible", "openai_responses"])
def test_real_answers_have_model_and_tokens(name: str) -> None:
    """Nearly every real answer does; the others state no usage."""
    with gzip.open(DATA / f"{name}.jsonl.gz") as file:
        lines = [json.loads(line) for line in file]
    answered = [line for line in lines if line["status"] < 300 and b"oken" in (line["response_body"] or "").encode()]
    found = [
        Exchange(
            request=HTTPRequest(url=line["uri"], body=(line["request_body"] or "").encode(), headers={}),
            reply=HTTPReply(status=200, body=line["response_body"].encode(), headers={}),
            facts=Facts(lineage=""),
        )
        for line in answered
    ]
    assert sum(bool(model_of(one)) for one in found) == len(found)
    assert sum({"input_tokens", "output_tokens"} <= usage_of(one).keys() for one in found) >= 0.97 * len(found)
