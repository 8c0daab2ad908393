"""`aggregator.transport()`: cassette, budget, limits and retries under httpx, without patches, in asyncio and trio."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aggregator
from aggregator import AggregatedUpdate, Budget, BudgetExceededError, ConfigError, LLMOptimizer, Module, ParameterNode
from aggregator.agents.transcripts import transcript
from aggregator.llm.budget import spending
from aggregator.llm.ledger import collecting
from aggregator.llm.models import as_model
from aggregator.llm.retry import RetryPolicy

httpx: Any = pytest.importorskip("httpx")
pytest.importorskip("anyio")

URL = "http://model.test/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
QUICK = RetryPolicy(first_delay=0.001)


def answer(text: str = "fine", status: int = 200, **headers: str) -> Any:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}
    return httpx.Response(status, json=body if status == 200 else {"error": {"message": "no"}}, headers=headers)


class Server:
    """Replaces the network: returns `answers` in order, then repeats the last one."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers) or [answer()]
        self.asked: list[Any] = []
        self.at_once = self.most = 0
        self.lock = threading.Lock()

    def answer(self, request: Any) -> Any:
        with self.lock:
            self.asked.append(json.loads(request.content or b"null"))
            given = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(given, Exception):
            raise given
        return httpx.Response(given.status_code, content=given.content, headers=given.headers)

    async def aanswer(self, request: Any) -> Any:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        import anyio

        await anyio.sleep(0.01)
        self.at_once -= 1
        return self.answer(request)


def ask(server: Server, **options: Any) -> Any:
    """Make one synchronous request."""
    with httpx.Client(transport=aggregator.transport(inner=httpx.MockTransport(server.answer), **options)) as client:
        return client.post(URL, json=BODY)


def ask_by_asyncio(server: Server, **options: Any) -> Any:
    return aggregator.portal.call(_ask, server, **options)


def ask_by_trio(server: Server, **options: Any) -> Any:
    trio: Any = pytest.importorskip("trio")

    async def main() -> Any:
        return await _ask(server, **options)

    return trio.run(main)


async def _ask(server: Server, **options: Any) -> Any:
    ours = aggregator.transport(inner=httpx.MockTransport(server.aanswer), **options)
    async with httpx.AsyncClient(transport=ours) as client:
        return await client.post(URL, json=BODY)


WAYS = pytest.mark.parametrize("way", [ask, ask_by_asyncio, ask_by_trio])


@WAYS
def test_any_cassette_records_and_replays_it(way: Callable[..., Any], tmp_path: Path) -> None:
    """No `clients=` is needed, as for a call of `LLM`."""
    server, path = Server(), tmp_path / "a.yaml"
    texts = []
    for mode in ("all", "none"):
        with aggregator.cassette(path, mode):
            texts.append(way(server).json()["choices"][0]["message"]["content"])
    assert texts == ["fine", "fine"]
    assert len(server.asked) == 1
    with pytest.raises(aggregator.CassetteMissError), aggregator.cassette(tmp_path / "other.yaml", "none"):
        way(server)


@WAYS
def test_lost_calls_are_retried(way: Callable[..., Any], tmp_path: Path) -> None:
    """A 503 and a lost connection are retried. A replay sees the same failures and sends nothing."""
    path = tmp_path / "a.yaml"
    server = Server(answer(status=503), httpx.ConnectError("refused"), answer())
    for mode in ("all", "none"):
        with aggregator.cassette(path, mode), collecting() as ledger, transcript() as seen:
            assert way(server, retry=QUICK).status_code == 200
        assert ledger.totals()["agent"].calls == 1
        assert seen.render().count("LLM call") == 1
    assert len(server.asked) == 3


@WAYS
def test_the_last_failure_is_the_clients_to_raise(way: Callable[..., Any]) -> None:
    """After `max_attempts` the SDK gets the response, or httpx's own exception."""
    server = Server(answer(status=429, **{"retry-after-ms": "1"}))
    assert way(server, retry=QUICK, max_attempts=2).status_code == 429
    assert len(server.asked) == 2
    with pytest.raises(httpx.ConnectError):
        way(Server(httpx.ConnectError("refused")), max_attempts=1)
    assert way(Server(answer(status=400))).status_code == 400


@WAYS
def test_it_counts_in_budgets(way: Callable[..., Any]) -> None:
    """Requests count in the context's budget and the transport's own; a request that exceeds either is not sent."""
    server, own, outer = Server(), Budget(calls=2), Budget(tokens=10_000)
    with spending(outer):
        way(server, budget=own)
        way(server, budget=own)
        with pytest.raises(BudgetExceededError):
            way(server, budget=own)
    assert (own.spent.calls, outer.spent.tokens, len(server.asked)) == (2, 20, 2)
    with pytest.raises(ConfigError, match="price for 'openai/m'"):
        way(server, budget=Budget(usd=1))


def test_it_keeps_the_limits() -> None:
    """An event loop has at most `max_concurrency` requests in flight."""
    server = Server()

    async def main() -> None:
        ours = aggregator.transport(inner=httpx.MockTransport(server.aanswer), max_concurrency=3)
        async with httpx.AsyncClient(transport=ours) as client, asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(client.post(URL, json=BODY))

    aggregator.portal.call(main)
    assert (len(server.asked), server.most) == (12, 3)


def test_identical_concurrent_requests_replay_in_order(tmp_path: Path) -> None:
    """They are matched by the order in which they were issued, as for `LLM`."""
    server = Server(*[answer(str(i)) for i in range(8)])
    found = []

    async def main() -> list[str]:
        ours = aggregator.transport(inner=httpx.MockTransport(server.aanswer))
        async with httpx.AsyncClient(transport=ours) as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(client.post(URL, json=BODY)) for _ in range(8)]
        return [task.result().json()["choices"][0]["message"]["content"] for task in tasks]

    for mode in ("all", "none"):
        with aggregator.cassette(tmp_path / "a.yaml", mode):
            found.append(aggregator.portal.call(main))
    assert found[0] == found[1]
    assert len(server.asked) == 8


class Agent(Module):
    """An agent that sends its requests through our transport."""

    def __init__(self, server: Server, **options: Any) -> None:
        self.rule = ParameterNode("Answer.", name="rule")
        self.client = httpx.Client(
            transport=aggregator.transport(inner=httpx.MockTransport(server.answer), retry=QUICK, **options)
        )

    def forward(self, x: str) -> Any:
        try:
            return self.client.post(URL, json=BODY).raise_for_status().json()["choices"][0]["message"]["content"]
        except aggregator.BudgetExceededError:
            raise RuntimeError("wrapped by an SDK") from None


def train(agent: Any, **options: Any) -> Any:
    fake = as_model(lambda messages: "TERMINATE", name="fake")
    trainer = AggregatedUpdate(agent, LLMOptimizer(llm=fake), llm=fake, **options)
    return trainer.train(lambda x, output, info: 0.0, [("one", "a"), ("two", "b")], batch_size=2, stepsize=0.0)


@pytest.mark.parametrize("clients", [None, "all"])
def test_a_run_counts_what_goes_through_it_once(clients: Any) -> None:
    """Usage, lost calls and budget errors count once, with and without `clients=`, even if the SDK wraps the error."""
    assert train(Agent(Server()), clients=clients).usage["agent"].calls == 2
    server = Server(answer(), answer(status=529))
    failures = train(Agent(server, max_attempts=1), clients=clients, max_concurrency=1).failures
    assert [(one.error, one.infrastructure) for one in failures] == [("ServerError", True)]
    with pytest.raises(BudgetExceededError):
        train(Agent(Server()), clients=clients, budget=Budget(calls=1), max_concurrency=1)


def test_streams_arrive_piece_by_piece() -> None:
    """The first piece arrives before the last one is sent."""
    events = [b'data: {"choices": [{"delta": {"content": "fi"}}]}\n\n', b"data: [DONE]\n\n"]
    sent: list[bytes] = []

    class Events(httpx.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Any:
            for event in events:
                sent.append(event)
                yield event

    class Inner(httpx.BaseTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Events())

    client = httpx.Client(transport=aggregator.transport(inner=Inner()))
    with collecting() as ledger, client, client.stream("POST", URL, json=BODY) as reply:
        pieces = reply.iter_bytes()
        assert next(pieces) == events[0]
        assert sent == events[:1]
        assert list(pieces) == events[1:]
    assert ledger.totals()["agent"].estimated_calls == 1


def test_wrong_arguments_are_refused() -> None:
    """Invalid arguments are rejected when the transport is created."""
    wrong: list[dict[str, Any]] = [{"max_attempts": 0}, {"max_concurrency": 0}, {"rpm": -1}]
    for options in wrong:
        with pytest.raises(ConfigError):
            aggregator.transport(**options)


def test_httpx2_is_served_too() -> None:
    """Newer SDKs accept only httpx2's clients; their requests use httpx2's own transports and responses."""
    httpx2: Any = pytest.importorskip("httpx2")

    def reply(request: Any) -> Any:
        return httpx2.Response(200, json={"ok": True})

    with httpx2.Client(transport=aggregator.transport(inner=httpx2.MockTransport(reply))) as client:
        found = client.post(URL, json=BODY)
    assert isinstance(found, httpx2.Response)
    assert found.json() == {"ok": True}
