"""Long prefixes that several calls share: marked for providers with cache marks, and written by one call only."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llm_fakes import ScriptedTransport, failure

from aggregator import LLM, Budget, cassette, lineage
from aggregator.errors import ServerError
from aggregator.llm.calls import ChatCall
from aggregator.llm.limiter import Openings
from aggregator.llm.messages import SHORTEST, Opening, find_mark, normalise
from aggregator.llm.names import resolve
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest

LONG = "Long instructions. " * 300
EPHEMERAL = {"type": "ephemeral"}
ENV = {"AWS_REGION": "r", "ANTHROPIC_API_KEY": "sk-ant-test"}


def prompt(opening: str = LONG, rest: str = "One instance.") -> list[dict[str, Any]]:
    user = Opening(role="user", content=opening + rest)
    user.length = len(opening)
    return [{"role": "system", "content": "Be brief."}, user]


def sent(model: str, messages: Any) -> dict[str, Any]:
    endpoint = resolve(model, base_url=None, env=ENV)
    body: dict[str, Any] = json.loads(
        endpoint.codec.encode(ChatCall(model=endpoint.model, messages=normalise(messages))).body
    )
    return body


def message(text: str = "x", status: int = 200) -> HTTPReply:
    body = {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "usage": {"output_tokens": 1}}
    return HTTPReply(status=status, body=msgspec.json.encode(body), headers={})


class Held(Transport):
    """Answers each request when the test allows it."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[HTTPReply]] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_anthropic_gets_a_mark_after_the_prefix() -> None:
    """The prefix is one block with the mark, followed by another block; system and answers are unchanged."""
    body = sent("anthropic/claude-x", [*prompt(), {"role": "assistant", "content": "No."}, "Again."])
    assert body["system"] == "Be brief."
    assert body["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": LONG, "cache_control": EPHEMERAL},
                {"type": "text", "text": "One instance."},
            ],
        },
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Again."},
    ]


@pytest.mark.parametrize("model", ["openrouter/anthropic/claude-x", "openrouter/google/gemini-2.5-pro"])
def test_a_gateway_passes_the_mark_on(model: str) -> None:
    """OpenRouter accepts Anthropic's mark in OpenAI's parts."""
    assert sent(model, prompt())["messages"][1] == {
        "role": "user",
        "content": [
            {"type": "text", "text": LONG, "cache_control": EPHEMERAL},
            {"type": "text", "text": "One instance."},
        ],
    }


def test_bedrock_gets_a_cache_point() -> None:
    """Claude and Nova support them; other models do not."""
    text = [{"text": LONG}, {"cachePoint": {"type": "default"}}, {"text": "One instance."}]
    for model in ("bedrock/eu.anthropic.claude-x", "bedrock/amazon.nova-lite-v1:0"):
        assert sent(model, prompt())["messages"][0]["content"] == text
    assert sent("bedrock/meta.llama3", prompt())["messages"][0]["content"] == [{"text": f"{LONG}One instance."}]


@pytest.mark.parametrize(
    "model",
    [
        "openai/gpt-5",
        "gemini/gemini-x",
        "openrouter/openai/gpt-5",
        "vllm/m",
        "ollama/m",
        "openai/gpt-5-pro",
        "mistral/m",
    ],
)
def test_servers_without_marks_are_sent_the_same_bytes(model: str) -> None:
    """An unknown mark would be refused, and would change a cassette's content."""
    plain = [dict(one) for one in prompt()]
    endpoint = resolve(model, env=ENV)
    calls = [ChatCall(model=endpoint.model, messages=normalise(messages)) for messages in (prompt(), plain)]
    marked, unmarked = (endpoint.codec.encode(call).body for call in calls)
    assert marked == unmarked


@pytest.mark.parametrize(
    "messages",
    [
        prompt("Short. "),
        prompt(LONG, ""),
        [{"role": "user", "content": LONG}],
        [Opening(role="user", content=LONG)],
        [Opening(role="user", content=[{"type": "text", "text": LONG}])],
    ],
)
def test_prefixes_that_cannot_be_cached(messages: list[dict[str, Any]]) -> None:
    """Nothing is marked if the prefix is too short, nothing follows it, it has no length, or the content has parts."""
    assert find_mark(messages) is None
    assert "cache_control" not in json.dumps(sent("anthropic/claude-x", messages))


def test_the_system_prompt_counts_in_the_length() -> None:
    """The cached part begins with the request."""
    short = prompt("x" * (SHORTEST - len("Be brief.")))
    assert find_mark(short) is not None
    assert find_mark(short[1:]) is None


def test_a_prefix_reaches_another_process() -> None:
    """A worker's call keeps its mark when it is passed on."""
    made = pickle.loads(pickle.dumps(normalise(prompt())))
    assert find_mark(made) == find_mark(prompt())


async def test_the_first_call_is_sent_and_the_others_follow() -> None:
    """Of several calls with one prefix, one is sent, and the others after its answer."""
    transport = Held()
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(llm.complete(prompt(rest=f"Instance {i}."))) for i in range(5)]
        await settled()
        assert len(transport.waiting) == 1
        transport.waiting[0].set_result(message("first"))
        await settled()
        assert len(transport.waiting) == 5
        for waiting in transport.waiting[1:]:
            waiting.set_result(message("other"))
    assert sorted(task.result().text for task in tasks) == ["first", *["other"] * 4]


async def test_another_prefix_does_not_wait() -> None:
    """Only calls with the same prefix wait for each other; calls without one never wait."""
    transport = Held()
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV)
    async with asyncio.TaskGroup() as group:
        for messages in (prompt(), prompt(LONG + "More."), prompt("Short."), "Hi", "Hi"):
            group.create_task(llm.complete(messages))
        await settled()
        assert len(transport.waiting) == 5
        for waiting in transport.waiting:
            waiting.set_result(message())


async def test_a_cached_prefix_is_not_waited_for() -> None:
    """For some minutes later calls find the cache; afterwards one of them goes first again."""
    now = 1000.0
    openings = Openings(lambda: now)
    assert await openings.enter(b"a", None)
    openings.leave(b"a")
    assert not await openings.enter(b"a", None)
    now += 200
    assert not await openings.enter(b"a", None)
    now += 200
    assert not await openings.enter(b"a", None)
    now += 241
    assert await openings.enter(b"a", None)


async def test_a_first_call_that_fails_releases_the_others() -> None:
    """The others are sent together; they do not fail one after another."""
    transport = Held()
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV, max_attempts=1)

    async def ask(i: int) -> str:
        try:
            return (await llm.complete(prompt(rest=f"{i}"))).text
        except ServerError:
            return "failed"

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(i)) for i in range(4)]
        await settled()
        transport.waiting[0].set_result(message(status=500))
        await settled()
        assert len(transport.waiting) == 4
        for waiting in transport.waiting[1:]:
            waiting.set_result(message())
    assert [task.result() for task in tasks] == ["failed", "x", "x", "x"]


async def test_a_first_call_that_is_cancelled_releases_the_others() -> None:
    """No call waits for one that has ended."""
    transport = Held()
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV)
    async with asyncio.TaskGroup() as group:
        first, second = (group.create_task(llm.complete(prompt(rest=f"{i}"))) for i in range(2))
        await settled()
        first.cancel()
        await settled()
        transport.waiting[1].set_result(message())
    assert second.result().text == "x"


async def test_a_call_waits_no_longer_than_its_deadline() -> None:
    """A first call that hangs uses only a part of the others' time."""
    openings = Openings(lambda: 1000.0)
    assert await openings.enter(b"a", None)
    assert not await openings.enter(b"a", 0.01)


async def test_a_tight_budget_causes_no_deadlock() -> None:
    """If the first call fails and waits for the budget, the calls that waited for it go on."""
    transport = ScriptedTransport(message(status=500), message())
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV, budget=Budget(tokens=40_000), max_attempts=2)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        tasks = [group.create_task(llm.complete(prompt(rest=f"{i}"), max_tokens=10)) for i in range(5)]
    assert [task.result().text for task in tasks] == ["x"] * 5


async def test_a_replay_does_not_wait(tmp_path: Path) -> None:
    """Recorded answers are played at once, and the recording holds the marks."""
    path = tmp_path / "openings.yaml"

    async def run(transport: Transport) -> list[str]:
        llm = LLM("anthropic/claude-x", transport=transport, env=ENV)

        async def ask(i: int) -> str:
            with lineage(f"sample={i}"):
                return (await llm.complete(prompt(rest=f"Instance {i}."))).text

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(i)) for i in range(4)]
        return [task.result() for task in tasks]

    with cassette(path, "once"):
        recorded = await run(ScriptedTransport(message("first"), message("other")))
    with cassette(path, "none"):
        assert await run(ScriptedTransport(failure(500))) == recorded
    assert "cache_control" in path.read_text()
