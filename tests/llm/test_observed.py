"""Calls of an agent's own clients are counted: transcript, usage, budget, lost calls, with and without a cassette."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import aggregator
from aggregator import (
    LLM,
    AggregatedUpdate,
    Budget,
    BudgetExceededError,
    ConfigError,
    LLMOptimizer,
    Module,
    ParameterNode,
    Price,
    Rollout,
    as_model,
    evaluate,
    headroom,
    optimize,
)
from aggregator.cassettes.storage import read
from aggregator.errors import TrainingWarning
from aggregator.executors.process import ProcessExecutor
from aggregator.llm.budget import spending
from aggregator.observing.observer import Observer

httpx: Any = pytest.importorskip("httpx")
requests: Any = pytest.importorskip("requests")

Answer = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """Answers POSTs with what `answer(path, body)` returns: (status, JSON or bytes). `asked` holds the bodies."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[str, dict[str, Any]], Answer] = lambda path, body: (200, chat("fine"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(data) if data[:1] == b"{" else {"raw": data.decode()}
        self.server.asked.append(body)
        status, found = self.server.answer(self.path, body)
        is_bytes = isinstance(found, bytes)
        answer = found if is_bytes else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-type", "text/event-stream" if is_bytes else "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST  # noqa: N815 - its base's name

    def log_message(self, *_: Any) -> None:
        pass


def chat(text: str, given: int = 7, answered: int = 3) -> dict[str, Any]:
    """Build an answer in OpenAI's shape."""
    usage = {"prompt_tokens": given, "completion_tokens": answered}
    return {"model": "m-2026", "choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


class Asking(Module):
    """Calls a model through its own client. `ask(url, body)` returns the answer's JSON."""

    def __init__(self, url: str, ask: Callable[[str, Any], Any] | None = None, **fields: Any) -> None:
        self.rule = ParameterNode("Answer.", name="rule")
        self.url = f"{url}/v1/chat/completions"
        self.fields = fields
        self.ask = ask or (lambda url, body: httpx.post(url, json=body).raise_for_status().json())

    def forward(self, x: str) -> Any:
        messages = [{"role": "system", "content": self.rule.data}, {"role": "user", "content": x}]
        answer = self.ask(self.url, {"model": "m", "messages": messages, **self.fields})
        return answer["choices"][0]["message"]["content"]


class Prompts:
    """A model that records its prompts and proposes nothing."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.model = as_model(self.answer, name="fake", prices={"fake": Price(input=0.0, output=0.0)})

    def answer(self, messages: Any) -> str:
        self.seen.append("\n".join(message["content"] for message in messages))
        return "TERMINATE"


class Keeping(Observer):
    """Records the rollouts that it sees."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    async def rollout(self, rollout: Rollout) -> None:
        self.rollouts.append(rollout)


def judge(x: Any, output: Any, info: Any) -> tuple[float, str]:
    return (1.0 if output == info else 0.0), "wrong"


def train(
    agent: Any, data: Any = (("one", "a"), ("two", "b")), *, clients: Any = "all", stepsize: float = 0.5, **options: Any
) -> Any:
    """Train with a fake optimizer and return (result, prompts, rollouts).

    With stepsize 0 only the agent calls a model.
    """
    prompts, keeping = Prompts(), Keeping()
    trainer = AggregatedUpdate(
        agent,
        LLMOptimizer(llm=prompts.model),
        llm=prompts.model,
        clients=clients,
        observers=[keeping],
        **options,
    )
    result = trainer.train(judge, list(data), batch_size=len(data), stepsize=stepsize)
    return result, prompts.seen, sorted(keeping.rollouts, key=lambda run: run.sample_id)


# What a run sees of them


def test_an_agents_own_client_shows_in_the_transcript_and_counts(server: Server) -> None:
    """Without a cassette, the optimizer's prompt holds the messages and the answer, and the usage has its role."""
    result, prompts, rollouts = train(Asking(server.url))
    assert rollouts[0].scores["milliseconds"] > 0
    assert "user: one" in rollouts[0].transcript
    assert any("system: Answer." in prompt and "user: one" in prompt and "reply: fine" in prompt for prompt in prompts)
    assert result.usage["agent"].calls == 2
    assert (result.usage["agent"].input_tokens, result.usage["agent"].output_tokens) == (14, 6)


def test_without_clients_nothing_is_counted(server: Server) -> None:
    """`()` ignores other clients, as None does without a cassette."""
    for clients in ((), None):
        result, prompts, _ = train(Asking(server.url), clients=clients)
        assert "agent" not in result.usage
        assert not any("reply: fine" in prompt for prompt in prompts)


def test_only_the_named_clients_count(server: Server) -> None:
    """`clients` takes a list of names, as `cassette(clients=)` does."""
    by_requests = Asking(server.url, lambda url, body: requests.post(url, json=body, timeout=9).json())
    assert "agent" not in train(by_requests, clients=["httpx"])[0].usage
    assert train(by_requests, clients=["requests"])[0].usage["agent"].calls == 2
    with pytest.raises(ConfigError, match="Expected clients="):
        train(by_requests, clients=["no-such-client"])


def test_optimize_counts_them_by_default(server: Server) -> None:
    """`optimize` has `clients="all"`."""
    prompts = Prompts()
    result = optimize(
        Asking(server.url),
        [("one", "a"), ("two", "b")],
        guide=judge,
        model=prompts.model,
        validate=0,
        run_dir=False,
        show=False,
    )
    assert result.usage["agent"].calls == 2


def test_the_guides_own_client_has_the_role_guide(server: Server) -> None:
    """Its calls are not in the agent's transcript."""

    def guide(x: Any, output: Any, info: Any) -> float:
        httpx.post(f"{server.url}/v1/chat/completions", json={"model": "j", "messages": [{"role": "user"}]})
        return 0.5

    prompts = Prompts()
    trainer = AggregatedUpdate(
        Asking(server.url), LLMOptimizer(llm=prompts.model), llm=prompts.model, clients=["httpx"]
    )
    result = trainer.train(guide, [("one", "a")])
    assert (result.usage["agent"].calls, result.usage["guide"].calls) == (1, 1)


def test_our_own_clients_calls_are_counted_once(server: Server) -> None:
    """An `LLM` uses aiohttp, which is one of the clients; a callable model may use any client."""
    server.answer = lambda path, body: (200, chat("fine"))

    class Own(Module):
        def __init__(self) -> None:
            self.rule = ParameterNode("Answer.", name="rule")
            self.llm = LLM("openai-compatible/m", base_url=f"{server.url}/v1")
            self.other = as_model(
                lambda messages: httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages}).json(),
                name="fn",
            )

        async def forward(self, x: str) -> str:
            first = await self.llm.complete(x)
            async with asyncio.TaskGroup() as group:
                task = group.create_task(self.other.complete(first.text))
            pieces = [piece async for piece in self.llm.stream(x)]
            return task.result().text + "".join(pieces)

    result, _, rollouts = train(Own(), [("one", "a")])
    assert result.usage["agent"].calls == 3
    assert rollouts[0].transcript.count("LLM call") == 3


def test_calls_of_concurrent_rollouts_are_separate(server: Server) -> None:
    """With tasks and with threads, each rollout's transcript holds its own call."""

    async def by_task(url: str, body: Any) -> Any:
        async with httpx.AsyncClient() as client:
            return (await client.post(url, json=body)).json()

    class Concurrent(Asking):
        async def forward(self, x: str) -> Any:
            body = {"model": "m", "messages": [{"role": "user", "content": x}]}
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(by_task(self.url, body)) for _ in range(2)]
            with ThreadPoolExecutor(1) as pool:
                pool.submit(requests.post, self.url, json=body, timeout=9).result()
            return tasks[0].result()["choices"][0]["message"]["content"]

    data = [(f"input-{i}", "a") for i in range(8)]
    result, _, rollouts = train(Concurrent(server.url), data)
    assert result.usage["agent"].calls == 24
    for run in rollouts:
        assert run.transcript.count(f"user: {run.x}\n") == 3
        assert run.transcript.count("user: ") == 3


def test_recorded_and_replayed_runs_agree(server: Server, tmp_path: Path) -> None:
    """A replay has the recording's transcript, usage and budget; the tape holds model, role and tokens."""
    path = tmp_path / "run.yaml"
    found = []
    for mode in ("all", "none"):
        budget = Budget(tokens=100_000)
        with aggregator.cassette(path, mode, clients="all"):
            result, _, rollouts = train(Asking(server.url, max_tokens=5), budget=budget)
        seen = [(run.transcript, run.scores) for run in rollouts]
        found.append((result.usage, seen, budget.spent))
    assert found[0] == found[1]
    assert found[0][0]["agent"].calls == 2
    recording = read(path)
    assert recording is not None
    facts = [row.exchange().facts for row in recording.rows]
    assert {(one.model, one.role, tuple(one.usage.items())) for one in facts} == {
        ("m", "agent", (("input_tokens", 7), ("output_tokens", 3)))
    }
    assert len(server.asked) == 2


def test_a_cassette_that_serves_clients_is_enough(server: Server, tmp_path: Path) -> None:
    """With `clients=None`, the default, the clients that the open cassette records are counted."""
    with aggregator.cassette(tmp_path / "a.yaml", "all", clients=["httpx"]):
        assert train(Asking(server.url), clients=None)[0].usage["agent"].calls == 2
        assert "agent" not in train(Asking(server.url), clients=())[0].usage


def test_telemetry_and_downloads_are_not_calls(server: Server) -> None:
    """Hosts that a cassette ignores by default are ignored here too, and so is a GET."""

    def ask(url: str, body: Any) -> Any:
        httpx.get(f"{server.url}/v1/models")
        httpx.post(f"{server.url}/v1/messages/count_tokens", json=body)
        with pytest.raises(httpx.TransportError):
            httpx.post("http://telemetry.crewai.com:1/x", json={}, timeout=0.001)
        return chat("fine")

    result, _, rollouts = train(Asking(server.url, ask))
    assert "agent" not in result.usage
    assert {run.transcript for run in rollouts} == {""}


# Lost calls


def failing(status: int, body: Any = None) -> Callable[[str, dict[str, Any]], Answer]:
    return lambda path, asked: (status, body or {"error": {"message": "slow down"}})


class OwnError(Exception):
    """A framework's own exception class."""


def wrapped(url: str, body: Any) -> Any:
    """Ask as a framework does that raises its own errors and hides their cause."""
    try:
        return httpx.post(url, json=body).raise_for_status().json()
    except httpx.HTTPError as error:
        found = OwnError(f"it failed: {error}")
    raise found


def swallowed(url: str, body: Any) -> Any:
    """Ask as code does that ignores the error."""
    try:
        return httpx.post(url, json=body).raise_for_status().json()
    except httpx.HTTPError:
        return None


@pytest.mark.parametrize("status", [429, 500, 529])
@pytest.mark.parametrize("ask", [None, wrapped, swallowed])
def test_an_sdks_lost_call_is_not_the_agents_failure(
    server: Server, ask: Callable[[str, Any], Any] | None, status: int
) -> None:
    """Wrapped or not, it is an infrastructure failure: no score, no feedback, and nothing for the optimizer to mend."""

    def answer(path: str, body: dict[str, Any]) -> Answer:
        is_lost = "two" in str(body)
        return failing(status)(path, body) if is_lost else (200, chat("fine"))

    server.answer = answer
    _, prompts, rollouts = train(Asking(server.url, ask), [("one", "a"), ("two", "b")])
    lost = next(run for run in rollouts if run.x == "two")
    assert lost.failure is not None
    assert (lost.failure.infrastructure, lost.score, lost.feedback) == (True, None, "")
    assert lost.failure.error == ("RateLimitError" if status == 429 else "ServerError")
    assert not any("two" in prompt for prompt in prompts)
    assert "failed: " in lost.transcript


@pytest.mark.parametrize("ask", [None, wrapped])
def test_a_lost_connection_is_not_the_agents_failure(server: Server, ask: Callable[[str, Any], Any] | None) -> None:
    """The connection is refused, as by a server that is down."""

    class Sometimes(Asking):
        def forward(self, x: str) -> Any:
            self.url = "http://127.0.0.1:9/v1/chat/completions" if x == "two" else f"{server.url}/v1/chat/completions"
            return super().forward(x)

    _, _, rollouts = train(Sometimes(server.url, ask), max_concurrency=1)
    lost = next(run for run in rollouts if run.x == "two")
    assert lost.failure is not None
    assert (lost.failure.error, lost.failure.infrastructure) == ("APIConnectionError", True)


def test_the_agents_own_errors_are_feedback(server: Server) -> None:
    """A bug after an answer, or after a retry that succeeded, is feedback as before."""
    statuses = iter([503, 200, 503, 200])
    server.answer = lambda path, body: (next(statuses), chat("fine"))

    def retried(url: str, body: Any) -> Any:
        answers = [httpx.post(url, json=body) for _ in range(2)]
        return answers[1].json()["no such field"]

    with pytest.warns(TrainingWarning, match="KeyError"):
        _, _, rollouts = train(Asking(server.url, retried), max_concurrency=1)
    for run in rollouts:
        assert run.failure is not None
        assert (run.failure.error, run.failure.infrastructure) == ("KeyError", False)
        assert "KeyError" in run.feedback
        assert run.transcript.count("LLM call") == 1  # the retry is the same call


def test_a_tools_error_status_is_not_a_lost_call(server: Server) -> None:
    """A 404 of a server that is not a known model's is ignored; a lost call of this kind would end the run."""
    server.answer = lambda path, body: (404, {"detail": "no such page"})

    def search(url: str, body: Any) -> Any:
        return httpx.post(f"{server.url}/search", json={"query": "x"}).raise_for_status().json()

    with pytest.warns(TrainingWarning, match="HTTPStatusError"):
        _, _, rollouts = train(Asking(server.url, search), [("one", "a")])
    assert rollouts[0].failure is not None
    assert (rollouts[0].failure.error, rollouts[0].failure.infrastructure) == ("HTTPStatusError", False)
    assert f"POST {server.url}/search" in rollouts[0].transcript


def test_a_refused_key_ends_the_run(server: Server) -> None:
    """As with our own client, no further call can succeed."""
    server.answer = failing(401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}})
    with pytest.raises(aggregator.TrainingError, match="AuthenticationError: openai answered 401"):
        train(Asking(server.url))


def test_a_guides_lost_call_is_infrastructure(server: Server) -> None:
    """A judge whose SDK gets a 429 gives no verdict, and that is not a bug of the guide."""
    server.answer = lambda path, body: (429, {}) if body.get("model") == "j" else (200, chat("fine"))

    def guide(x: Any, output: Any, info: Any) -> float:
        return float(swallowed(f"{server.url}/v1/chat/completions", {"model": "j", "messages": []})["score"])

    keeping, prompts = Keeping(), Prompts()
    trainer = AggregatedUpdate(
        Asking(server.url),
        LLMOptimizer(llm=prompts.model),
        llm=prompts.model,
        clients="all",
        observers=[keeping],
    )
    trainer.train(guide, [("one", "a")])
    failure = keeping.rollouts[0].failure
    assert failure is not None
    assert (failure.stage, failure.error, failure.infrastructure) == ("guide", "RateLimitError", True)


def test_evaluate_and_headroom_accept_clients(server: Server) -> None:
    """A lost call has no score; without `clients=` it counts as the lowest score."""
    server.answer = lambda path, body: (429, {}) if "two" in str(body) else (200, chat("a"))
    data = [("one", "a"), ("two", "b")]
    with pytest.warns(TrainingWarning, match="RateLimitError"):
        assert evaluate(Asking(server.url), judge, data, min_score=0.0, clients="all") == [1.0, None]
    assert evaluate(Asking(server.url), judge, data, min_score=0.0) == [1.0, 0.0]
    found = headroom(Asking(server.url), judge, data, repeats=2, min_score=0.0, clients="all")
    assert (found.judged, {failure.infrastructure for failure in found.failures}) == (1, {True})


def test_a_lost_call_of_an_overridden_forward_is_lost(server: Server) -> None:
    """This holds although the hook asks by itself, and neither the agent nor the guide does."""
    server.answer = failing(429)

    class Own(AggregatedUpdate):
        async def aforward(self, agent: Any, x: Any, guide: Any, info: Any, verbose: bool | str = False) -> Any:
            return wrapped(f"{server.url}/v1/chat/completions", {"model": "m", "messages": []})

    fake = Prompts().model
    trainer = Own(Asking(server.url), LLMOptimizer(llm=fake), llm=fake, clients="all")
    failures = trainer.train(judge, [("one", "a")]).failures
    assert [(one.error, one.infrastructure) for one in failures] == [("RateLimitError", True)]


class Batch:
    """An agent that takes batches, as many frameworks do."""

    isolation = "overlay"
    max_concurrency = None

    def __init__(self, url: str) -> None:
        self.rule = ParameterNode("Answer.", name="rule")
        self.url = f"{url}/v1/chat/completions"

    def parameters(self) -> list[ParameterNode[Any]]:
        return [self.rule]

    async def rollouts(self, tasks: Any, guide: Any) -> Any:
        for i, task in enumerate(tasks):
            try:
                body = httpx.post(self.url, json={"model": "m", "messages": []}).raise_for_status().json()
            except httpx.HTTPError as error:
                raise OwnError("the batch failed") from error
            yield i, Rollout(sample_id=task.sample.id, output=body["choices"][0]["message"]["content"], score=1.0)


def test_an_agent_that_takes_batches_is_counted_too(server: Server) -> None:
    """Usage and budget are counted; a lost call loses the rest of the batch and is not the agent's failure."""
    assert train(Batch(server.url))[0].usage["agent"].calls == 2
    with pytest.raises(BudgetExceededError):
        train(Batch(server.url), budget=Budget(calls=1), stepsize=0.0)
    statuses = iter([200, 429])
    server.answer = lambda path, body: (next(statuses), chat("fine"))
    failures = train(Batch(server.url))[0].failures
    assert [(one.error, one.infrastructure) for one in failures] == [("RateLimitError", True)]


# Budget


def test_a_budget_of_calls_stops_other_clients(server: Server) -> None:
    """The error carries the partial result, and nothing is sent after the refusal."""
    budget = Budget(calls=10)
    data = [(str(i), "a") for i in range(40)]
    with pytest.raises(BudgetExceededError) as caught:
        train(Asking(server.url), data, budget=budget)
    assert caught.value.result is not None
    assert len(server.asked) <= 10
    assert budget.spent.calls <= 10


@pytest.mark.parametrize("hide", [wrapped, swallowed, lambda url, body: [swallowed(url, body) for _ in range(9)][-1]])
def test_a_budget_error_ends_the_run_although_the_sdk_hides_it(server: Server, hide: Callable[[str, Any], Any]) -> None:
    """Wrapped, swallowed or retried, it is raised when the rollout ends."""

    def hiding(url: str, body: Any) -> Any:
        try:
            return hide(url, body)
        except BudgetExceededError:
            if hide is wrapped:
                raise OwnError("it failed") from None
        return chat("none")

    with pytest.raises(BudgetExceededError):
        train(Asking(server.url, hiding), budget=Budget(calls=1), max_concurrency=1, stepsize=0.0)
    assert len(server.asked) == 1


def test_a_hidden_budget_error_ends_an_evaluation(server: Server, tmp_path: Path) -> None:
    """This holds outside a run too, if the open cassette records the agent's client."""

    def hiding(url: str, body: Any) -> Any:
        with suppress(BudgetExceededError):
            httpx.post(url, json=body)
        return chat("none")

    tape = aggregator.cassette(tmp_path / "a.yaml", "all", clients="httpx")
    with tape, spending(Budget(calls=1)), pytest.raises(BudgetExceededError):
        evaluate(Asking(server.url, hiding), judge, [("one", "a"), ("two", "b")], max_concurrency=1)
    assert len(server.asked) == 1


def test_an_sdk_that_retries_every_error_does_not_retry_a_refusal(server: Server) -> None:
    """SDKs by Stainless retry any exception, so they get a response that they do not retry."""
    stainless = {"x-stainless-retry-count": "0"}
    seen = []

    def ask(url: str, body: Any) -> Any:
        reply = httpx.post(url, json=body, headers=stainless)
        seen.append((reply.status_code, reply.headers.get("x-should-retry")))
        return chat("none")

    with pytest.raises(BudgetExceededError, match="within the budget of 1 calls, got one"):
        train(Asking(server.url, ask), budget=Budget(calls=1), max_concurrency=1, stepsize=0.0)
    assert seen == [(200, None), (424, "false")]


def test_tokens_are_reserved_before_sending(server: Server) -> None:
    """The reservation uses the request's max_tokens, or the default limit; a request that does not fit is not sent."""
    with pytest.raises(BudgetExceededError):
        train(Asking(server.url), budget=Budget(tokens=4_000), stepsize=0.0)  # 4,096 tokens are assumed for an answer
    assert server.asked == []
    budget = Budget(tokens=4_000)
    train(Asking(server.url, max_tokens=50), budget=budget, stepsize=0.0)
    assert budget.spent.tokens == 20
    assert budget.reserved.tokens == 0


def test_requests_in_flight_are_not_waited_for(server: Server) -> None:
    """A request that does not fit together with those in flight is refused, with the remedy."""
    arrived, leave = threading.Event(), threading.Event()

    def answer(path: str, body: dict[str, Any]) -> Answer:
        arrived.set()
        leave.wait(20)
        return 200, chat("fine")

    server.answer = answer

    def ask(url: str, body: Any) -> Any:
        if body["messages"][1]["content"] == "two":
            arrived.wait(20)
            try:
                return httpx.post(url, json=body).json()
            finally:
                leave.set()
        return httpx.post(url, json=body, timeout=30).json()

    budget = Budget(tokens=5_000)
    with pytest.raises(BudgetExceededError, match=r"reserved by requests in flight.*lower max_concurrency"):
        train(Asking(server.url, ask, max_tokens=3_000), budget=budget, stepsize=0.0)
    assert len(server.asked) == 1
    assert (budget.spent.tokens, budget.reserved.tokens) == (10, 0)


def test_an_unknown_price_under_a_budget_in_usd_is_one_config_error(server: Server) -> None:
    """It names the model and where to give its price, before anything is sent; `prices` is the remedy."""
    with pytest.raises(ConfigError, match=r"price for 'openai/m'.*prices=.*clients="):
        train(Asking(server.url), budget=Budget(usd=1.0))
    assert server.asked == []
    budget = Budget(usd=1.0)
    prices = {"openai/m": Price(input=1.0, output=2.0)}
    result, _, _ = train(Asking(server.url), budget=budget, prices=prices)
    assert result.usage["agent"].cost == pytest.approx(2 * (7 + 2 * 3) / 1e6)
    assert budget.spent.usd == pytest.approx(2 * (7 + 2 * 3) / 1e6)


def test_an_unknown_format_counts_as_a_call(server: Server) -> None:
    """Such a call has no tokens and no model, and needs no price."""
    server.answer = lambda path, body: (200, {"out": "fine"})

    def ask(url: str, body: Any) -> Any:
        httpx.post(f"{server.url}/predict", json={"features": [1, 2]})
        return chat("fine")

    budget = Budget(usd=1.0, tokens=10, calls=10)
    result, _, rollouts = train(Asking(server.url, ask), budget=budget, stepsize=0.0)
    assert result.usage["agent"].calls == 2
    assert result.usage["agent"].input_tokens is None
    assert (budget.spent.calls, budget.spent.tokens) == (2, 0)
    assert '"features"' in rollouts[0].transcript


def test_a_lost_call_is_charged_what_it_may_have_cost(server: Server) -> None:
    """A refused request counts as a call; a connection that failed costs nothing."""
    server.answer = failing(429)
    budget = Budget(tokens=10_000)
    train(Asking(server.url, max_tokens=50), budget=budget, max_concurrency=1)
    assert (budget.spent.calls, budget.spent.tokens) == (2, 0)
    budget = Budget(tokens=10_000)
    train(Asking("http://127.0.0.1:9", max_tokens=50), budget=budget, max_concurrency=1)
    assert (budget.spent.calls, budget.spent.tokens, budget.reserved.calls) == (0, 0, 0)


def test_worker_processes_cannot_count_other_clients() -> None:
    """Creating the trainer raises a ConfigError, so that no call goes uncounted."""
    with ProcessExecutor(1) as executor, pytest.raises(ConfigError, match=r"clients=None with ProcessExecutor"):
        train(Asking("http://127.0.0.1:9"), executor=executor)


# Streams


EVENTS = [
    {"model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}}]} for text in ("fi", "ne")
]
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


class Slow(BaseHTTPRequestHandler):
    """Sends the events of a stream one by one, each after the client has received the previous one."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        with suppress(BrokenPipeError):  # a client that leaves early
            self.send_events()

    def send_events(self) -> None:
        events = [*(json.dumps(event) for event in (*EVENTS, LAST, *self.server.more)), "[DONE]"]
        for i, event in enumerate(events):
            if i:
                self.server.got.acquire(timeout=20)
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


class Streaming(ThreadingHTTPServer):
    """`got` counts the pieces that the client has read.

    A client that buffers the whole stream would block the server.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Slow)
        self.got = threading.Semaphore(0)
        self.more: list[Any] = [USAGE]
        self.url = f"http://127.0.0.1:{self.server_port}/v1/chat/completions"


@pytest.fixture
def streaming() -> Iterator[Streaming]:
    with Streaming() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


def by_httpx(server: Streaming, body: Any) -> list[bytes]:
    with httpx.stream("POST", server.url, json=body, timeout=10) as reply:
        return taken(server, reply.iter_bytes())


def by_async_httpx(server: Streaming, body: Any) -> list[bytes]:
    async def ask() -> list[bytes]:
        pieces = []
        async with httpx.AsyncClient(timeout=10) as client, client.stream("POST", server.url, json=body) as reply:
            async for piece in reply.aiter_bytes():
                pieces.append(piece)
                server.got.release()
        return pieces

    return aggregator.portal.call(ask) if not aggregator.portal.is_here() else []


def by_aiohttp(server: Streaming, body: Any) -> list[bytes]:
    import aiohttp

    async def ask() -> list[bytes]:
        pieces = []
        async with aiohttp.ClientSession() as session, session.post(server.url, json=body) as reply:
            async for piece in reply.content.iter_any():
                pieces.append(piece)
                server.got.release()
        return pieces

    return aggregator.portal.call(ask)


def by_requests(server: Streaming, body: Any) -> list[bytes]:
    with requests.post(server.url, json=body, stream=True, timeout=10) as reply:
        return taken(server, reply.iter_content(None))


def by_urllib3(server: Streaming, body: Any) -> list[bytes]:
    import urllib3

    reply = urllib3.PoolManager().request("POST", server.url, json=body, preload_content=False, timeout=10)
    return taken(server, reply.stream())


def taken(server: Streaming, pieces: Iterator[bytes]) -> list[bytes]:
    found = []
    for piece in pieces:
        found.append(piece)
        server.got.release()
    return found


@pytest.mark.parametrize("read", [by_httpx, by_async_httpx, by_aiohttp, by_requests, by_urllib3])
def test_streams_are_not_buffered(streaming: Streaming, read: Callable[[Streaming, Any], list[bytes]]) -> None:
    """The server sends a piece after the client has the previous one; the whole answer is counted at its end."""

    class Reading(Module):
        def __init__(self) -> None:
            self.rule = ParameterNode("Answer.", name="rule")

        def forward(self, x: str) -> int:
            body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": x}]}
            return len(read(streaming, body))

    result, _, rollouts = train(Reading(), [("one", 5)])
    assert rollouts[0].failure is None
    assert rollouts[0].output == 5
    assert "reply: fine" in rollouts[0].transcript
    used = result.usage["agent"]
    assert (used.calls, used.input_tokens, used.output_tokens, used.estimated_calls) == (1, 7, 3, 0)


def test_a_stream_without_usage_is_estimated_and_marked(streaming: Streaming, tmp_path: Path) -> None:
    """OpenAI's streams state usage only on request: four bytes count as a token, on the tape and in the budget too."""
    streaming.more = []
    for _ in range(9):
        streaming.got.release()
    agent = Asking("", lambda url, body: by_httpx(streaming, body | {"stream": True}) and chat("fine"))
    budget, path = Budget(tokens=50_000), tmp_path / "a.yaml"
    for mode in ("all", "none"):
        with aggregator.cassette(path, mode, clients="all"):
            result, _, _ = train(agent, [("one", "a")], budget=budget, stepsize=0.0)
        used = result.usage["agent"]
        assert (used.input_tokens, used.output_tokens, used.estimated_calls) == (3, 1, 1)
    assert budget.spent.tokens == 8
    recording = read(path)
    assert recording is not None
    assert recording.rows[0].exchange().facts.usage["estimated_calls"] == 1


def test_a_stream_that_is_left_early_counts_what_came(streaming: Streaming) -> None:
    """The rest of the reservation is returned."""

    def ask(url: str, body: Any) -> Any:
        with httpx.stream("POST", streaming.url, json=body, timeout=10) as reply:
            next(reply.iter_bytes())
        return chat("fine")

    budget = Budget(tokens=50_000)
    result, _, rollouts = train(Asking("", ask, stream=True), [("one", "a")], budget=budget, stepsize=0.0)
    assert result.usage["agent"].estimated_calls == 1
    assert "reply: fi\n" in rollouts[0].transcript + "\n"
    assert (budget.spent.tokens, budget.reserved.tokens) == (4, 0)
    for _ in range(9):
        streaming.got.release()
