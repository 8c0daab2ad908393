"""The client against servers that others wrote: aimock (five dialects, injected faults), llama-server (inference).

`make test-peers` installs them (`install_peers.py`); without them each test is skipped with the reason.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from install_peers import AIMOCK, LLAMA_SERVER, TINY_MODEL

from aggregator.errors import (
    APIConnectionError,
    AuthenticationError,
    ContextLengthError,
    DecodeError,
    LLMError,
    RateLimitError,
    ServerError,
)
from aggregator.llm.client import LLM

pytestmark = pytest.mark.peers

KEY = "peer-key"
SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(command: Sequence[str | Path], url: str, log: Path) -> Iterator[str]:
    """Run a server until it answers at `url`/health, and end it afterwards."""
    with log.open("wb") as out:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail(f"{command[0]} ended with {process.returncode}: {log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=1):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        else:
            pytest.fail(f"{command[0]} did not answer within 30 s: {log.read_text()[-2000:]}")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=10)


def fixture(said: str, response: dict[str, Any], nth: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "match": {"userMessage": said} | ({} if nth is None else {"sequenceIndex": nth}),
        "response": response,
        **more,
    }


def failure(status: int, kind: str) -> dict[str, Any]:
    return {"error": {"message": f"injected {status}", "type": kind}, "status": status}


HELLO = {"content": "Hello from afar", "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}
FIXTURES = [
    fixture("greet me", HELLO),
    fixture("call a tool", {"toolCalls": [{"name": "look", "arguments": {"city": "Bern"}}]}),
    fixture("be cut", {"content": "Hel", "finishReason": "length"}),
    fixture("busy once", failure(429, "rate_limit_error"), 0),
    fixture("busy once", HELLO, 1),
    fixture("busy always", failure(429, "rate_limit_error")),
    fixture("fail once", failure(500, "server_error"), 0),
    fixture("fail once", HELLO, 1),
    fixture("fail always", failure(500, "server_error")),
    fixture("wrong for good", failure(400, "invalid_request_error")),
    fixture("babble always", HELLO, chaos={"malformedRate": 1}),
    fixture("hang up always", HELLO, chaos={"disconnectRate": 1}),
    fixture("break off", {"content": "word " * 200}, truncateAfterChunks=2),
]


@pytest.fixture(scope="module")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not AIMOCK.exists() or not shutil.which("node"):
        pytest.skip(f"aimock is not installed: no {AIMOCK}; run `make test-peers`")
    folder = tmp_path_factory.mktemp("aimock")
    (folder / "fixtures.json").write_text(json.dumps({"fixtures": FIXTURES}))
    port = free_port()
    command: list[str | Path] = [
        AIMOCK,
        "-p",
        str(port),
        "-f",
        folder / "fixtures.json",
        "--log-level",
        "warn",
        "--strict",
    ]
    with server(command, f"http://127.0.0.1:{port}", folder / "log.txt") as url:
        yield url


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not LLAMA_SERVER.exists() or not TINY_MODEL.exists():
        pytest.skip(f"llama-server is not built: no {LLAMA_SERVER}; run `make test-peers`")
    port = free_port()
    address = ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    options = ["-t", "1", "-c", "8192", "-np", "4", "--alias", "tiny", "--jinja", "--no-webui"]
    command: list[str | Path] = [LLAMA_SERVER, "-m", TINY_MODEL, *address, *options]
    log = tmp_path_factory.mktemp("llama") / "log.txt"
    with server(command, f"http://127.0.0.1:{port}", log) as url:
        yield url


DIALECTS = {
    "openai/gpt-4o": "{url}/v1",
    "ollama/qwen3:8b": "{url}/v1",
    "anthropic/claude-sonnet-4-5": "{url}",
    "gemini/gemini-2.5-flash": "{url}/v1beta",
    "vertex/gemini-2.5-flash": "{url}/v1/projects/p/locations/global/publishers/google",
    "azure/gpt-4o": "{url}?api-version=2024-10-21",
}


def client(model: str, url: str, **given: Any) -> LLM:
    return LLM(model, base_url=DIALECTS[model].format(url=url), api_key=KEY, env={}, **given)


@pytest.mark.parametrize("model", DIALECTS)
async def test_the_server_understands_every_dialect(aimock: str, model: str) -> None:
    """The server accepts our requests and returns text, in each API's own format."""
    async with client(model, aimock) as llm:
        found = await llm.complete("Please greet me", max_tokens=20, temperature=0.5, stop=["END"])
    assert (found.text, found.finish_reason) == ("Hello from afar", "stop")


@pytest.mark.parametrize("model", DIALECTS)
async def test_every_dialect_streams(aimock: str, model: str) -> None:
    """The deltas join to the whole answer."""
    async with client(model, aimock) as llm:
        stream = llm.stream("Please greet me", max_tokens=20)
        deltas = [delta async for delta in stream]
    assert "".join(deltas) == stream.completion.text == "Hello from afar"
    assert stream.completion.finish_reason == "stop"


@pytest.mark.parametrize("model", DIALECTS)
async def test_every_dialect_calls_tools(aimock: str, model: str) -> None:
    """A tool is sent in the API's own form, and its call is returned in ours."""
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
    async with client(model, aimock) as llm:
        (call,) = (await llm.complete("Please call a tool", tools=[tool])).tool_calls
    assert (call.name, json.loads(call.arguments)) == ("look", {"city": "Bern"})
    assert call.id


async def test_the_server_understands_the_responses_api(aimock: str) -> None:
    """Text, streams, tools in both directions, and a failure with its class."""
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
    async with client("openai/gpt-4o", aimock, api="responses") as llm:
        found = await llm.complete([{"role": "system", "content": "Be kind."}, "Please greet me"], max_tokens=20)
        stream = llm.stream("Please greet me")
        deltas = [delta async for delta in stream]
        called = await llm.complete("Please call a tool", tools=[tool])
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "rain"}
        after = await llm.complete(["Please greet me", called, result])
        with pytest.raises(RateLimitError):
            await llm.complete("Please busy always")
    assert (found.text, found.finish_reason) == ("Hello from afar", "stop")
    assert "".join(deltas) == stream.completion.text == "Hello from afar"
    assert (called.tool_calls[0].name, called.finish_reason) == ("look", "tool_calls")
    assert after.text


@pytest.mark.parametrize("model", ["openai/gpt-4o", "azure/gpt-4o"])
async def test_usage_and_truncation_are_visible(aimock: str, model: str) -> None:
    """Tokens are counted, and a truncated answer has that finish reason."""
    async with client(model, aimock) as llm:
        whole = await llm.complete("Please greet me")
        cut = await llm.complete("Please be cut")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (3, 4)
    assert (cut.text, cut.finish_reason) == ("Hel", "length")


@pytest.mark.parametrize("words", ["busy once", "fail once"])
async def test_a_transient_fault_is_retried(aimock: str, words: str) -> None:
    """One 429 or 500 costs one more request."""
    async with client("openai/gpt-4o", aimock) as llm:
        found = await llm.complete(f"Please {words}")
    assert (found.text, found.attempts) == ("Hello from afar", 2)


@pytest.mark.parametrize(
    ("model", "words", "kind", "attempts"),
    [
        ("openai/gpt-4o", "busy always", RateLimitError, 2),
        ("anthropic/claude-sonnet-4-5", "busy always", RateLimitError, 2),
        ("gemini/gemini-2.5-flash", "busy always", RateLimitError, 2),
        ("azure/gpt-4o", "fail always", ServerError, 2),
        ("openai/gpt-4o", "babble always", DecodeError, 2),
        ("openai/gpt-4o", "hang up always", APIConnectionError, 2),
        ("openai/gpt-4o", "wrong for good", LLMError, 1),
        ("anthropic/claude-sonnet-4-5", "wrong for good", LLMError, 1),
        ("gemini/gemini-2.5-flash", "wrong for good", LLMError, 1),
    ],
)
async def test_a_permanent_fault_is_a_typed_error(
    aimock: str, model: str, words: str, kind: type[LLMError], attempts: int
) -> None:
    """Transient faults use all attempts, permanent ones one; the error counts them."""
    async with client(model, aimock, max_attempts=2) as llm:
        with pytest.raises(kind) as caught:
            await llm.complete(f"Please {words}")
    assert caught.value.attempts == attempts
    assert caught.value.message


async def test_a_stream_that_breaks_off_is_an_error(aimock: str) -> None:
    """Deltas arrived before the connection was lost: that is an error, not a short answer."""
    async with client("openai/gpt-4o", aimock, max_attempts=1) as llm:
        with pytest.raises(LLMError):
            async for _ in llm.stream("Please break off"):
                pass


def tiny(url: str, **given: Any) -> LLM:
    return LLM("llamacpp/tiny", base_url=f"{url}/v1", api_key=KEY, env={}, **given)


async def test_inference_with_options(llama: str) -> None:
    """A real server accepts our options:

    the limit is respected, the seed makes answers repeatable, usage is counted.
    """
    async with tiny(llama) as llm:
        first = await llm.complete("Hi", max_tokens=8, temperature=1.0, seed=7)
        again = await llm.complete("Hi", max_tokens=8, temperature=1.0, seed=7)
    assert first.text == again.text
    assert first.usage.output_tokens == 8
    assert first.finish_reason == "length"
    assert first.usage.input_tokens


@pytest.mark.requirement("built 7: structured output")
async def test_a_schema_is_enforced(llama: str) -> None:
    """json_schema constrains even a model that writes nonsense."""
    async with tiny(llama) as llm:
        found = await llm.complete("Decide", max_tokens=400, response_format=SCHEMA, temperature=0)
    answer = json.loads(found.text)
    assert set(answer) == {"sure", "kind"}
    assert isinstance(answer["sure"], bool)


async def test_a_refused_schema_falls_back_to_a_lower_form(llama: str) -> None:
    """It is requested in a lower form, within the attempts; the server's refusal raises nothing."""
    impossible = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]}
    async with tiny(llama, max_attempts=3) as llm:
        with pytest.raises(LLMError) as caught:  # the lower forms reach a model that writes nonsense
            await llm.complete("Decide", max_tokens=30, response_format=impossible)
    assert caught.value.attempts > 1


async def test_a_wrong_key(llama: str) -> None:
    """A 401 has its own class, and is not retried."""
    async with LLM("llamacpp/tiny", base_url=f"{llama}/v1", api_key="wrong", env={}) as llm:
        with pytest.raises(AuthenticationError) as caught:
            await llm.complete("Hi", max_tokens=4)
    assert (caught.value.status, caught.value.attempts) == (401, 1)


async def test_a_prompt_that_is_too_long(llama: str) -> None:
    """The server's own message for a full context is a ContextLengthError, without retries."""
    async with tiny(llama) as llm:
        with pytest.raises(ContextLengthError) as caught:
            await llm.complete("long " * 3000, max_tokens=4)
    assert (caught.value.code, caught.value.attempts) == ("exceed_context_size_error", 1)


async def test_a_real_stream(llama: str) -> None:
    """Tokens arrive one by one; usage is on the whole answer."""
    async with tiny(llama) as llm:
        stream = llm.stream("Hi", max_tokens=16, temperature=1.0, seed=3)
        deltas = [delta async for delta in stream]
    assert "".join(deltas) == stream.completion.text
    assert stream.completion.usage.output_tokens == 16
    assert len(deltas) > 1


async def test_the_responses_api_of_another_server(llama: str) -> None:
    """llama-server supports it too: text, its limit, and a stream with the same usage."""
    async with tiny(llama, api="responses") as llm:
        found = await llm.complete("Say something.", max_tokens=8)
        stream = llm.stream("Say something.", max_tokens=8)
        deltas = [delta async for delta in stream]
    assert (found.usage.output_tokens or 0) <= 8
    assert "".join(deltas) == stream.completion.text
    assert stream.completion.usage.input_tokens == found.usage.input_tokens


async def test_the_messages_api_of_another_server(llama: str) -> None:
    """llama-server supports Anthropic's format too; the whole prompt is counted, including cached tokens."""
    async with LLM("anthropic/tiny", base_url=llama, api_key=KEY, env={}) as llm:
        first = await llm.complete("Hi", max_tokens=4)
        second = await llm.complete("Hi", max_tokens=4)
        stream = llm.stream("Hi", max_tokens=4)
        deltas = [delta async for delta in stream]
    assert first.finish_reason == "length"
    assert first.usage.input_tokens == second.usage.input_tokens
    assert "".join(deltas) == stream.completion.text


@pytest.mark.requirement("client 2: llama-server after 5 s idle", "figure: 450 POSTs after 5 s idle: 0 failures")
@pytest.mark.long
async def test_no_call_is_lost_on_a_connection_that_the_server_just_closed(llama: str) -> None:
    """llama-server closes idle connections after 5 s: 450 calls sent at that time all succeed, each sent once."""
    idle = [4.98 + 0.05 * round_ / 8 for round_ in range(9)]
    sent = 0
    async with tiny(llama, max_attempts=1, max_concurrency=50) as llm:
        for seconds in idle:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(llm.complete("Hi", max_tokens=1)) for _ in range(50)]
            sent += len([call.result() for call in calls])
            await asyncio.sleep(seconds)
    assert sent == 450
