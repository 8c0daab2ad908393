"""Cancelled calls close their sockets, return places and budgets, and leave no task."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llm_fakes import answer, answering, raw, read_request, serving

from aggregator import LLM, Budget


class Holding:
    """Reads requests, never answers, and counts the clients that disconnect."""

    def __init__(self) -> None:
        self.waiting = 0
        self.gone = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        self.waiting += 1
        if await reader.read() == b"":
            self.gone += 1


async def until(reached: Any) -> None:
    async with asyncio.timeout(10):
        while not reached():  # noqa: ASYNC110 - what it waits for is a server's count
            await asyncio.sleep(0.001)


@pytest.mark.requirement(
    "client 15: cancelling closes the socket",
    "client 15: no task is left",
    "figure: 64 of 64 in flight cancelled: the server sees all, no task is left",
)
async def test_the_server_sees_all_of_64_cancelled_calls() -> None:
    """Every socket is closed, every place and reservation is returned, and no task is left."""
    server, budget = Holding(), Budget(calls=1000)
    before = asyncio.all_tasks()
    async with serving(server) as url:
        llm = LLM("cancelled", base_url=url, budget=budget)
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(llm.complete("hello")) for _ in range(64)]
            await until(lambda: server.waiting == 64)
            for call in calls:
                call.cancel()
        await until(lambda: server.gone == 64)
        await llm.aclose()
    assert all(call.cancelled() for call in calls)
    assert llm._line.limiter().in_flight == 0
    assert budget.reserved.calls == 0
    assert asyncio.all_tasks() == before


async def test_the_client_works_on_after_a_cancellation() -> None:
    """Connections cut by cancelled calls are not used again."""
    server = Holding()
    async with serving(server) as url:
        llm = LLM("m", base_url=url)
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(llm.complete("hello"))
            await until(lambda: server.waiting == 1)
            call.cancel()
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    async with serving(answering([answer("hi")]), port=port):
        assert (await llm.complete("hello")).text == "hi"


async def test_cancelled_while_waiting_for_a_place() -> None:
    """A call cancelled in the queue frees its place and sends nothing."""
    served = 0
    go_on = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while await read_request(reader) is not None:
            served += 1
            await go_on.wait()
            writer.write(raw(answer()))

    async with serving(handle) as url:
        llm = LLM("queue", base_url=url, max_concurrency=1)
        async with asyncio.TaskGroup() as tasks:
            first, *rest = [tasks.create_task(llm.complete("hello")) for _ in range(5)]
            await until(lambda: served == 1)
            for call in rest:
                call.cancel()
            go_on.set()
        await llm.complete("hello")
    assert (first.result().text, served) == ("hello", 2)
