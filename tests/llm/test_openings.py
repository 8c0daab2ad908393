"""Long openings that several calls share: marked where a provider caches by marks, and written by one call only."""

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
    """Answers each request when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[HTTPReply]] = []

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_anthropic_is_sent_a_mark_after_the_opening() -> None:
    """The opening is one block with the mark, what follows another; system and answers stay as they are."""
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
def test_a_gateway_hands_the_mark_on(model: str) -> None:
    """OpenRouter takes Anthropic's mark in OpenAI's parts."""
    assert sent(model, prompt())["messages"][1] == {
        "role": "user",
        "content": [
            {"type": "text", "text": LONG, "cache_control": EPHEMERAL},
            {"type": "text", "text": "One instance."},
        ],
    }


def test_bedrock_is_sent_a_cache_point() -> None:
    """Claude and Nova have them; the same models only."""
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
    """A mark that a server does not know would be refused, and would change what a cassette holds."""
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
def test_openings_that_are_none(messages: list[dict[str, Any]]) -> None:
    """Too short to be cached, nothing after it, no length, or parts: nothing is marked."""
    assert find_mark(messages) is None
    assert "cache_control" not in json.dumps(sent("anthropic/claude-x", messages))


def test_the_system_prompt_counts_for_the_length() -> None:
    """What is cached begins with the request."""
    short = prompt("x" * (SHORTEST - len("Be brief.")))
    assert find_mark(short) is not None
    assert find_mark(short[1:]) is None


def test_an_opening_crosses_to_another_process() -> None:
    """A worker's call keeps its mark when it is passed on."""
    made = pickle.loads(pickle.dumps(normalise(prompt())))
    assert find_mark(made) == find_mark(prompt())


async def test_the_first_call_goes_ahead_and_the_others_follow() -> None:
    """Calls with one opening at once: one is sent, and all the others once it has been answered."""
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


async def test_another_opening_does_not_wait() -> None:
    """Only calls that share an opening wait for one another, and calls without one never do."""
    transport = Held()
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV)
    async with asyncio.TaskGroup() as group:
        for messages in (prompt(), prompt(LONG + "More."), prompt("Short."), "Hi", "Hi"):
            group.create_task(llm.complete(messages))
        await settled()
        assert len(transport.waiting) == 5
        for waiting in transport.waiting:
            waiting.set_result(message())


async def test_an_opening_that_is_warm_is_not_waited_for() -> None:
    """Within some minutes the next step's calls find the cache written; later one of them goes ahead again."""
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


async def test_a_first_call_that_fails_lets_the_others_go() -> None:
    """The others do not fail one after another: they are sent together."""
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


async def test_a_first_call_that_is_cancelled_lets_the_others_go() -> None:
    """Nobody waits for a call that has ended."""
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
    """A first call that hangs costs the others a part of their own time, not all of it."""
    openings = Openings(lambda: 1000.0)
    assert await openings.enter(b"a", None)
    assert not await openings.enter(b"a", 0.01)


async def test_a_tight_budget_is_no_deadlock() -> None:
    """The call that goes first fails and waits for room in the budget: those that waited for it have gone on."""
    transport = ScriptedTransport(message(status=500), message())
    llm = LLM("anthropic/claude-x", transport=transport, env=ENV, budget=Budget(tokens=40_000), max_attempts=2)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        tasks = [group.create_task(llm.complete(prompt(rest=f"{i}"), max_tokens=10)) for i in range(5)]
    assert [task.result().text for task in tasks] == ["x"] * 5


async def test_a_replay_waits_for_nobody(tmp_path: Path) -> None:
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
