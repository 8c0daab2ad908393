"""Answers with status 200 that are errors: reported broken by the provider, empty, withheld or refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from llm_fakes import QUESTION, ScriptedTransport, VirtualTime

from aggregator import LLM, Budget, as_model
from aggregator.errors import (
    BadRequestError,
    BrokenResponseError,
    ContentFilterError,
    EmptyResponseError,
    LLMError,
    RateLimitError,
    ResponseError,
    ServerError,
    ends_run,
    is_infrastructure,
)
from aggregator.llm.ledger import collecting
from aggregator.records import HTTPReply

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


def chat(finish: str | None, content: Any = None, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": USAGE}


def gemini(finish: str | None, *parts: Any) -> dict[str, Any]:
    content = {"content": {"role": "model", "parts": list(parts)}} if parts else {"content": {"role": "model"}}
    return {"candidates": [{**content, "finishReason": finish}]}


def claude(stop: str | None, *blocks: Any) -> dict[str, Any]:
    return {"content": list(blocks), "stop_reason": stop, "usage": {"input_tokens": 10, "output_tokens": 5}}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NAMELESS = {"id": "1", "type": "function", "function": {"name": "", "arguments": '{"x": 1}'}}
EMPTY_CALL = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
GOOD = {"openrouter/m": chat("stop", "good"), "gemini/m": gemini("STOP", {"text": "good"}),
        "anthropic/m": claude("end_turn", {"type": "text", "text": "good"})}  # fmt: skip
BROKEN = [
    ("openrouter/m", chat("error"), BrokenResponseError),
    ("openrouter/m", chat("insufficient_system_resource", "half a sen"), BrokenResponseError),
    ("openrouter/m", chat("abort", "half a sen"), BrokenResponseError),
    ("openrouter/m", chat("network_error", "half"), BrokenResponseError),
    ("openrouter/m", chat("a word of tomorrow", "half"), BrokenResponseError),
    ("openrouter/m", chat("stop", ""), EmptyResponseError),
    ("openrouter/m", chat("stop", None), EmptyResponseError),
    ("openrouter/m", chat(None, ""), EmptyResponseError),
    ("openrouter/m", chat("tool_calls", None), EmptyResponseError),
    ("openrouter/m", chat("stop", "", reasoning_content="thinking, and no more"), EmptyResponseError),
    ("openrouter/m", {"error": {"message": "upstream went away"}}, ResponseError),
    ("openrouter/m", {"error": {"message": "slow down", "code": 429}}, RateLimitError),
    ("openrouter/m", {"success": False, "errors": [{"message": "no capacity", "code": 7003}]}, EmptyResponseError),
    ("openrouter/m", {"code": 429, "msg": "too many", "success": False}, RateLimitError),
    ("openrouter/m", {"type": "server_error", "detail": "the upstream is gone"}, ServerError),
    ("anthropic/m", {"type": "overloaded_error", "message": "Overloaded"}, ServerError),
    ("gemini/m", gemini("MALFORMED_FUNCTION_CALL"), BrokenResponseError),
    ("gemini/m", gemini("UNEXPECTED_TOOL_CALL", {"text": "half"}), BrokenResponseError),
    ("gemini/m", gemini("OTHER", {"text": "half"}), BrokenResponseError),
    ("gemini/m", gemini("MALFORMED_RESPONSE", {"text": "half"}), BrokenResponseError),
    ("gemini/m", gemini("STOP"), EmptyResponseError),
    ("gemini/m", gemini("STOP", {"text": "hm", "thought": True}), EmptyResponseError),
    ("anthropic/m", claude("end_turn"), EmptyResponseError),
    ("anthropic/m", claude("end_turn", {"type": "thinking", "thinking": "hm"}), EmptyResponseError),
    ("openrouter/m", chat("tool_calls", None, tool_calls=[NAMELESS]), BrokenResponseError),
    ("openrouter/m", chat("tool_calls", "I call.", tool_calls=[CALL, NAMELESS]), BrokenResponseError),
    ("openrouter/m", chat("tool_calls", None, tool_calls=[EMPTY_CALL]), EmptyResponseError),
    ("gemini/m", gemini("STOP", {"functionCall": {"args": {"x": 1}}}), BrokenResponseError),
    ("anthropic/m", claude("tool_use", {"type": "tool_use", "id": "1", "input": {"x": 1}}), BrokenResponseError),
    ("anthropic/m", claude("new_reason", {"type": "text", "text": "half"}), BrokenResponseError),
]
WITHHELD = [
    ("openrouter/m", chat("stop", [{"type": "refusal", "refusal": "I cannot help with that."}])),
    ("openrouter/m", chat("content_filter")),
    ("openrouter/m", chat("sensitive", "")),
    ("openrouter/m", chat("stop", None, refusal="I cannot help with that.")),
    ("gemini/m", gemini("SAFETY")),
    ("gemini/m", gemini("PROHIBITED_CONTENT")),
    ("anthropic/m", claude("refusal")),
    ("anthropic/m", claude("refusal", {"type": "text", "text": "I will"})),
]
FINE = [
    ("openrouter/m", chat("length", ""), "length"),
    ("openrouter/m", chat("content_filter", "half a sen"), "content_filter"),
    ("openrouter/m", chat("tool_calls", None, tool_calls=[CALL]), "tool_calls"),
    ("openrouter/m", chat("stop", None, tool_calls=[CALL]), "stop"),
    ("openrouter/m", chat("stop", "text and a gateway's empty call", tool_calls=[EMPTY_CALL]), "stop"),
    ("openrouter/m", chat("length", None, tool_calls=[NAMELESS]), "length"),
    ("openrouter/m", chat("stop", None, audio={"data": "AAAA"}), "stop"),
    ("openrouter/m", chat("stop", "", images=[{"type": "image_url"}]), "stop"),
    ("openrouter/m", chat("", "of Snowflake"), "stop"),
    ("gemini/m", gemini("MAX_TOKENS"), "length"),
    ("gemini/m", gemini("STOP", {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}), "stop"),
    ("anthropic/m", claude("pause_turn", {"type": "text", "text": "searching"}), "length"),
    ("anthropic/m", claude("end_turn", {"type": "server_tool_use", "id": "1"}), "stop"),
]


def llm(name: str, *bodies: Any, **options: Any) -> tuple[LLM, ScriptedTransport]:
    replies = [HTTPReply(status=200, body=msgspec.json.encode(body), headers={}) for body in bodies]
    transport, time = ScriptedTransport(*replies), VirtualTime()
    made = LLM(name, api_key="k" * 9, env={}, transport=transport, clock=time.clock, sleep=time.sleep, **options)
    return made, transport


@pytest.mark.parametrize(("name", "body", "kind"), BROKEN)
async def test_a_broken_answer_was_a_success_without_text(name: str, body: Any, kind: type[LLMError]) -> None:
    """An answer that the provider reports as broken is retried, then raised; it is not the agent's fault."""
    client, transport = llm(name, body, GOOD[name])
    assert (await client.complete(QUESTION)).text == "good"
    assert len(transport.requests) == 2
    client, transport = llm(name, body)
    with pytest.raises(kind) as caught:
        await client.complete(QUESTION)
    assert (caught.value.attempts, len(transport.requests)) == (3, 3)
    assert is_infrastructure(caught.value)
    assert not ends_run(caught.value)


@pytest.mark.parametrize(("name", "body"), WITHHELD)
async def test_a_refusal_was_an_empty_success(name: str, body: Any) -> None:
    """Withheld and refused answers depend on the prompt, so they are not retried."""
    client, transport = llm(name, body)
    with pytest.raises(ContentFilterError):
        await client.complete(QUESTION)
    assert len(transport.requests) == 1


@pytest.mark.parametrize(("name", "body", "reason"), FINE)
async def test_answers_without_text_that_are_fine(name: str, body: Any, reason: str) -> None:
    """Tool calls, images, answers cut at their limit and unknown finish reasons are accepted."""
    client, _ = llm(name, body)
    assert (await client.complete(QUESTION)).finish_reason == reason


async def test_an_empty_answer_to_a_call_with_stop_sequences() -> None:
    """A stop sequence can end an answer before its first token, so an empty answer is valid."""
    client, _ = llm("openrouter/m", chat("stop", ""))
    assert (await client.complete(QUESTION, stop=["END"])).text == ""


async def test_an_error_inside_an_answer_that_is_the_callers_fault() -> None:
    """An invalid request is an error of the request, whatever the status line says."""
    client, transport = llm("openrouter/m", {"error": {"message": "no such field", "code": "invalid_request_error"}})
    with pytest.raises(BadRequestError):
        await client.complete(QUESTION)
    assert len(transport.requests) == 1


async def test_a_broken_answer_is_paid_for() -> None:
    """The tokens of each broken answer count in the budget and in the run's usage."""
    budget = Budget(tokens=100_000)
    client, _ = llm("openrouter/m", chat("error", "half"), budget=budget)
    with collecting() as ledger, pytest.raises(BrokenResponseError) as caught:
        await client.complete(QUESTION)
    assert caught.value.text == "half"
    assert (budget.spent.calls, budget.spent.tokens) == (3, 45)
    assert [(total.calls, total.total_tokens) for total in ledger.totals().values()] == [(3, 45)]


async def test_a_broken_stream() -> None:
    """A stream that ends with an error word raises after its deltas, and is retried before the first one."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]},
              {"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}]  # fmt: skip

    def body(*parts: Any) -> bytes:
        return b"".join(b"data: " + msgspec.json.encode(part) + b"\n\n" for part in parts) + b"data: [DONE]\n\n"

    empty = HTTPReply(status=200, body=body(chunks[1]), headers={"content-type": "text/event-stream"})
    cut = HTTPReply(status=200, body=body(*chunks), headers={"content-type": "text/event-stream"})
    transport, time = ScriptedTransport(empty, cut), VirtualTime()
    client = LLM("openrouter/m", api_key="k" * 9, env={}, transport=transport, clock=time.clock, sleep=time.sleep)
    read: list[str] = []

    async def read_on() -> None:
        async for delta in client.stream(QUESTION):
            read.append(delta)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(BrokenResponseError, match="ended with 'error' after 4 characters"):
        await read_on()
    assert (read, len(transport.requests)) == (["half"], 2)


async def test_a_broken_answer_of_another_client() -> None:
    """Answers of an SDK are checked in the same way; a plain function may return an empty string."""
    with pytest.raises(BrokenResponseError):
        await as_model(lambda messages: chat("error", "half")).complete(QUESTION)
    assert (await as_model(lambda messages: "").complete(QUESTION)).text == ""


@pytest.mark.parametrize(
    ("name", "usage", "tokens"),
    [
        ("openrouter/m", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 10**12}, (10, 5)),
        ("openrouter/m", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": -1}, (10, 5)),
        ("gemini/m", {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 10**12}, (10, 5)),
    ],
)
async def test_an_absurd_total_made_the_output_unknown(
    name: str, usage: dict[str, int], tokens: tuple[int, int]
) -> None:
    """A total is used only for what it adds to input and output."""
    field = "usageMetadata" if name == "gemini/m" else "usage"
    client, _ = llm(name, {**GOOD[name], field: usage})
    found = (await client.complete(QUESTION)).usage
    assert (found.input_tokens, found.output_tokens) == tokens
