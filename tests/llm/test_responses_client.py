"""The Responses API through the client: chosen by name, recorded and replayed, budgeted, traced, streamed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llm_fakes import QUESTION, ScriptedTransport, VirtualTime, failure

from aggregator import LLM, Budget, Price, cassette
from aggregator.errors import BudgetExceededError, ConfigError, NotFoundError, RateLimitError
from aggregator.llm.codecs.openai import OpenAIChat
from aggregator.llm.codecs.responses import OpenAIResponses
from aggregator.llm.names import resolve
from aggregator.records import HTTPReply

REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAABo" + "x7Q_-" * 60}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "add", "arguments": '{"a": 2}'}
USAGE = {
    "input_tokens": 10,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 15,
}


def message(text: str) -> dict[str, Any]:
    return {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def response(*output: Any, status: str = "completed", **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "model": "gpt-5-pro", "status": status, "output": list(output), "usage": USAGE, **more}


def reply(*output: Any, **more: Any) -> HTTPReply:
    headers = {"content-type": "application/json", "x-request-id": "req_1"}
    return HTTPReply(status=200, body=msgspec.json.encode(response(*output, **more)), headers=headers)


def streamed(*texts: str) -> HTTPReply:
    deltas = [{"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": t} for t in texts]
    events = [*deltas, {"type": "response.completed", "response": response(message("".join(texts)))}]
    body = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)
    return HTTPReply(status=200, body=body, headers={"content-type": "text/event-stream"})


def client(transport: ScriptedTransport, **options: Any) -> LLM:
    virtual = VirtualTime()
    options = {"env": {}, "api_key": "sk-test-000000", "transport": transport, **options}
    return LLM("openai/gpt-5-pro", clock=virtual.clock, sleep=virtual.sleep, **options)


@pytest.mark.parametrize(
    "name",
    [
        "gpt-5-pro", "gpt-5-pro-2025-10-06", "gpt-5.2-pro", "o1-pro", "o3-pro-2025-06-10", "gpt-5-codex",
        "gpt-5.1-codex-max", "codex-mini-latest", "o3-deep-research", "o4-mini-deep-research-2025-06-26",
        "computer-use-preview",
    ],
)  # fmt: skip
@pytest.mark.parametrize("provider", ["openai/", "openai:", "azure/", ""])
def test_models_without_chat_completions_get_the_responses_api(provider: str, name: str) -> None:
    """It is chosen automatically; the user's choice takes precedence."""
    env = {"AZURE_OPENAI_ENDPOINT": "https://r.openai.azure.com"}
    assert isinstance(resolve(provider + name, env=env).codec, OpenAIResponses)
    assert isinstance(resolve(provider + name, env=env, api="chat").codec, OpenAIChat)


@pytest.mark.parametrize(
    "name",
    ["openai/gpt-5", "openai/gpt-4o", "openai/o3", "openai/o4-mini", "openai/gpt-5-mini", "openai/gpt-5-prototype"],
)
def test_other_models_keep_chat_completions(name: str) -> None:
    """The user can choose the Responses API with one option."""
    assert isinstance(resolve(name, env={}).codec, OpenAIChat)
    assert isinstance(resolve(name, env={}, api="responses").codec, OpenAIResponses)


@pytest.mark.parametrize(
    "name", ["openrouter/openai/gpt-5-pro", "openai-compatible/gpt-5-pro", "litellm-proxy/gpt-5-pro"]
)
def test_gateways_keep_chat_completions(name: str) -> None:
    """A gateway serves such a model by chat completions."""
    assert isinstance(resolve(name, base_url="http://127.0.0.1:9/v1", env={}).codec, OpenAIChat)


def test_the_name_that_litellm_gives_this_api() -> None:
    """`openai/responses/MODEL` chooses the API; it is not sent as a model name."""
    endpoint = resolve("openai/responses/gpt-4o", env={})
    assert (endpoint.model, type(endpoint.codec)) == ("gpt-4o", OpenAIResponses)


@pytest.mark.parametrize(("name", "words"), [("anthropic/claude-x", "none"), ("openai/gpt-5", "'chat', 'responses'")])
def test_an_api_that_a_provider_does_not_have(name: str, words: str) -> None:
    """The error lists the provider's APIs."""
    with pytest.raises(ConfigError, match=words):
        LLM(name, api="assistants", env={})


@pytest.mark.parametrize(
    ("base_url", "version", "url"),
    [
        ("https://r.openai.azure.com", None, "https://r.openai.azure.com/openai/v1/responses"),
        ("https://r.openai.azure.com/openai/v1/", None, "https://r.openai.azure.com/openai/v1/responses"),
        ("https://r.openai.azure.com/openai/deployments/d", None, "https://r.openai.azure.com/openai/v1/responses"),
        ("https://r.services.ai.azure.com/models", None, "https://r.services.ai.azure.com/openai/v1/responses"),
        (
            "https://r.openai.azure.com",
            "2025-04-01",
            "https://r.openai.azure.com/openai/responses?api-version=2025-04-01",
        ),
        (
            "https://r.openai.azure.com/?api-version=7",
            None,
            "https://r.openai.azure.com/openai/responses?api-version=7",
        ),
    ],
)
async def test_addresses_on_azure(base_url: str, version: str | None, url: str) -> None:
    """The deployment is in the body, so the path is the resource's."""
    env = {"OPENAI_API_VERSION": version} if version else {}
    transport = ScriptedTransport(reply(message("hi")))
    llm = LLM("azure/d", api="responses", base_url=base_url, api_key="k", env=env, transport=transport)
    await llm.complete(QUESTION)
    assert transport.requests[0].url == url
    assert transport.bodies()[0]["model"] == "d"
    assert transport.requests[0].headers["api-key"] == "k"


async def test_a_tool_loop_is_recorded_and_replayed(tmp_path: Path) -> None:
    """The second turn holds the first turn's reasoning unchanged, also from a cassette, which has no key."""
    path = tmp_path / "loop.yaml"

    async def loop(transport: ScriptedTransport, **options: Any) -> tuple[str, Any]:
        llm = client(transport, **options)
        first = await llm.complete(QUESTION)
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "4"}
        second = await llm.complete([*QUESTION, first, result])
        return second.text, second.usage

    live = ScriptedTransport(reply(REASONING, CALL), reply(message("It is 4.")))
    with cassette(path, "once"):
        recorded = await loop(live)
    assert live.bodies()[1]["input"][1:] == [
        REASONING,
        CALL,
        {"type": "function_call_output", "call_id": "call_1", "output": "4"},
    ]
    offline = ScriptedTransport(failure(500))
    with cassette(path, "none") as tape:
        assert await loop(offline, api_key=None) == recorded
    assert (offline.requests, tape.report) == ([], [])
    assert "sk-test-000000" not in path.read_text()
    assert str(REASONING["encrypted_content"]) in path.read_text().replace("\n", "").replace(" ", "")


async def test_a_stream_is_recorded_and_replayed(tmp_path: Path) -> None:
    """Deltas and the whole answer are the same from the cassette."""
    path = tmp_path / "stream.yaml"

    async def read(llm: LLM) -> tuple[list[str], Any]:
        stream = llm.stream(QUESTION)
        return [delta async for delta in stream], stream.completion.usage

    with cassette(path, "once"):
        recorded = await read(client(ScriptedTransport(streamed("He", "llo"))))
    assert recorded[0] == ["He", "llo"]
    with cassette(path, "none"):
        assert await read(client(ScriptedTransport(failure(500)))) == recorded


async def test_a_budget_reserves_by_the_limit_of_this_api() -> None:
    """The limit is sent as max_output_tokens, given or assumed; the usage with cached tokens is charged."""
    prices = {"openai/gpt-5-pro": Price(input=10, output=100, cached=1)}
    budget = Budget(usd=3)
    transport = ScriptedTransport(reply(message("hi")))
    llm = client(transport, budget=budget, prices=prices)
    answer = await llm.complete(QUESTION)
    assert transport.bodies()[0]["max_output_tokens"] == 4096 + 16_384  # a reasoning model
    assert answer.usage.cost == pytest.approx((6 * 10 + 4 * 1 + 5 * 100) / 1e6)
    assert budget.spent.usd == pytest.approx(answer.usage.cost)
    for extra in ({"max_output_tokens": 40_000}, {"max_completion_tokens": 40_000}):
        with pytest.raises(BudgetExceededError):
            await llm.complete(QUESTION, extra=extra)
    assert len(transport.requests) == 1


async def test_a_failed_response_is_retried() -> None:
    """A failed response with status 200 is not an answer; each request counts."""
    failed = reply(status="failed", error={"code": "rate_limit_exceeded", "message": "slow down"})
    transport = ScriptedTransport(failed, reply(message("hi")))
    answer = await client(transport).complete(QUESTION)
    assert (answer.text, answer.attempts) == ("hi", 2)
    with pytest.raises(RateLimitError) as caught:
        await client(ScriptedTransport(failed), max_attempts=2).complete(QUESTION)
    assert caught.value.attempts == 2


async def test_a_model_that_cannot_encrypt_is_asked_without() -> None:
    """The name looks like a reasoning model's: the refusal is obeyed, and remembered for the next call."""
    refused = failure(400, "Encrypted content is not supported with this model.")
    transport = ScriptedTransport(refused, reply(message("hi")))
    llm = client(transport)
    assert [(await llm.complete(QUESTION)).text for _ in range(2)] == ["hi", "hi"]
    assert ["include" in body for body in transport.bodies()] == [True, False, False]


async def test_structured_output_falls_back_to_lower_forms() -> None:
    """After a refused schema json_object is tried, then the prompt alone."""
    schema = {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}
    refused = failure(400, "Invalid schema for response_format")
    transport = ScriptedTransport(refused, reply(message('{"k": 1}')))
    answer = await client(transport).complete(QUESTION, response_format=schema)
    assert answer.text == '{"k": 1}'
    formats = [body["text"]["format"]["type"] for body in transport.bodies()]
    assert formats == ["json_schema", "json_object"]


async def test_an_error_recommends_the_responses_api() -> None:
    """Chat completions refuse a new model that only this API serves: the error names the argument that selects it."""
    refused = failure(404, "This model is only supported in v1/responses and not in v1/chat/completions.")
    llm = LLM("openai/gpt-9-new", api_key="k", env={}, transport=ScriptedTransport(refused))
    with pytest.raises(NotFoundError, match='api="responses"'):
        await llm.complete(QUESTION)


def test_a_pickled_client_keeps_its_api() -> None:
    """A worker uses the same API."""
    made = pickle.loads(pickle.dumps(LLM("openai/gpt-4o", api="responses")))
    assert isinstance(made.endpoint.codec, OpenAIResponses)


def test_from_synchronous_code() -> None:
    """Trace's users make synchronous calls."""
    assert client(ScriptedTransport(reply(message("hi"))))(messages=QUESTION).text == "hi"
