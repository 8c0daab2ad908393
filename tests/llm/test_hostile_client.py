"""Hostile answers through the client: only AggregatorErrors are raised, and a replay ends as its recording did."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from llm_fakes import VirtualTime
from test_hostile import FAMILIES, JUNK, NOISE, Family, framed, places, put

from aggregator import LLM, Budget, cassette, lineage
from aggregator.errors import LLMError
from aggregator.protocols import Transport
from aggregator.records import HTTPReply, HTTPRequest

MODELS: Mapping[str, Mapping[str, Any]] = {
    "openai": {"model": "openai/m"},
    "anthropic": {"model": "anthropic/m"},
    "gemini": {"model": "gemini/m"},
    "responses": {"model": "openai/m", "api": "responses"},
    "bedrock": {"model": "bedrock/m"},
}
ENV = {"AWS_REGION": "r"}
SCHEMA = {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]}
VALUES = [
    "", " ", "-1", "0", "nan", "inf", "-inf", "1e999", "1" * 4_000, "0x10", "1_000", "\u0661", "soon", "6ms", "-5s",
    "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 00 Jan 0000 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -9999",
    "9999-12-31T23:59:59.999999+23:59", "0000-00-00T00:00:00Z", "{}", "true", "TRUE",
]  # fmt: skip
NAMES = [
    "retry-after", "retry-after-ms", "date", "x-should-retry", "x-request-id", "request-id", "content-type", "location",
    "x-ratelimit-remaining-requests", "x-ratelimit-limit-requests", "x-ratelimit-reset-requests",
    "x-ratelimit-remaining-tokens", "x-ratelimit-limit-tokens", "x-ratelimit-reset-tokens",
    "anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-limit",
    "anthropic-ratelimit-requests-reset", "x-amzn-errortype", "x-amzn-requestid",
]  # fmt: skip


class Serving(Transport):
    """Always sends one reply."""

    def __init__(self, reply: HTTPReply) -> None:
        self.reply = reply

    async def send(self, request: HTTPRequest, *, timeout: float | None = None) -> HTTPReply:
        return self.reply


async def outcome(name: str, reply: HTTPReply, way: str) -> str:
    """Return what a caller gets: the text, or the class of our error. Any other exception fails the test."""
    virtual = VirtualTime()
    llm = LLM(
        **MODELS[name],
        api_key="k-hostile-000",
        env=ENV,
        transport=Serving(reply),
        clock=virtual.clock,
        sleep=virtual.sleep,
        max_attempts=2,
        timeout=1e6,
        budget=Budget(tokens=10**12),
    )
    try:
        if way == "stream":
            stream = llm.stream("Hi")
            deltas = [delta async for delta in stream]
            return "".join(deltas) + repr(stream.completion.text)
        return (await llm.complete("Hi", response_format=SCHEMA if way == "structured" else None)).text
    except LLMError as error:
        return type(error).__name__


def bodies(family: Family) -> list[bytes]:
    """Yield noise, and samples of answers and streams with a damaged field."""
    random, found = Random(3), list(NOISE)
    whole = list(places(family.answer))
    for path in random.sample(whole, min(12, len(whole))):
        for junk in random.sample(JUNK, 4):
            body = json.loads(json.dumps(family.answer))
            put(body, path, junk)
            found.append(json.dumps(body).encode())
    events: Callable[..., bytes] = family.pack
    for path in random.sample(list(places(family.events)), 12):
        damaged = json.loads(json.dumps(family.events))
        put(damaged, path, random.choice(JUNK))
        found.append(events(damaged))
    return found


@pytest.mark.parametrize("way", ["complete", "stream", "structured"])
@pytest.mark.parametrize("name", MODELS)
async def test_every_body_and_its_replay(name: str, way: str, tmp_path: Path) -> None:
    """Each body gives an answer or an AggregatorError, and its replay gives the same."""
    family, path = FAMILIES[name], tmp_path / "hostile.yaml"
    kind = "application/vnd.amazon.eventstream" if family.pack is framed else "text/event-stream"
    replies = [
        HTTPReply(status=200, body=body, headers={"content-type": kind if way == "stream" else "application/json"})
        for body in bodies(family)
    ]

    async def run() -> list[str]:
        found = []
        for i, reply in enumerate(replies):
            with lineage(f"call={i}"):
                found.append(await outcome(name, reply, way))
        return found

    with cassette(path, "once"):
        recorded = await run()
    with cassette(path, "none"):
        assert await run() == recorded


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("status", [200, 301, 400, 429, 500, 529])
async def test_every_header(name: str, status: int) -> None:
    """With any header value, the call ends with an answer or an AggregatorError, and never waits for ever."""
    body = json.dumps(FAMILIES[name].answer).encode()
    for header in NAMES:
        for value in VALUES:
            reply = HTTPReply(status=status, body=body, headers={header: value, "x-ratelimit-limit-requests": "5"})
            found = await outcome(name, reply, "complete")
            assert found == "Hello" if status == 200 else found.endswith("Error")
