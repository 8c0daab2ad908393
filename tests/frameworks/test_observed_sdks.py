"""What an agent's own SDK asks counts: the real package against a loopback server, without a cassette and with one.

`make test-frameworks` runs this in an environment for each group of SDKs. An SDK that is not installed is skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from calls import Call
from model_server import ModelServer

import aggregator
from aggregator import AggregatedUpdate, Budget, BudgetExceededError, LLMOptimizer, Module, ParameterNode, as_model
from aggregator.llm.budget import spending
from aggregator.llm.ledger import collecting
from aggregator.observing.observer import Observer
from aggregator.records import Rollout

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the SDKs, whose warnings we cannot fix
    pytest.mark.usefixtures("surroundings"),
]


@pytest.fixture(autouse=True)
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no SDK of AWS wait long."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


class Asking(Module):
    """Calls an SDK once for each input."""

    def __init__(self, call: Call, url: str) -> None:
        self.rule = ParameterNode("Answer.", name="rule")
        self.call, self.url = call, url
        self.client = None if call.is_async else call.open(url)

    def forward(self, x: str) -> Any:
        if not self.call.is_async:
            return self.call.ask(self.client, x)
        return self._asked(x)

    async def _asked(self, x: str) -> Any:
        return await self.call.ask(self.call.open(self.url), x)


class Keeping(Observer):
    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    async def rollout(self, rollout: Rollout) -> None:
        self.rollouts.append(rollout)


def run(call: Call, url: str, **options: Any) -> tuple[Any, list[Rollout]]:
    """Run four inputs at once; dspy.Parallel, whose progress bar is not thread-safe, in sequence."""
    options |= {"max_concurrency": 1} if "Parallel" in call.name else {}
    fake, keeping = as_model(lambda messages: "TERMINATE", name="fake"), Keeping()
    trainer = AggregatedUpdate(
        Asking(call, url), LLMOptimizer(llm=fake), llm=fake, clients="all", observers=[keeping], **options
    )
    data = [(f"question {i}", None) for i in range(4)]
    result = trainer.train(lambda x, output, info: 1.0, data, batch_size=4, stepsize=0.0)
    return result, sorted(keeping.rollouts, key=lambda one: one.sample_id)


def shown(run: Rollout) -> str:
    """Return one rollout's part of the transcript, in one line."""
    return " ".join(run.transcript.split())


def test_an_sdks_calls_are_counted(call: Call, server: ModelServer, tmp_path: Path) -> None:
    """Transcript, usage and budget count them; a recorded and a replayed run are equal."""
    _, plain = run(call, server.url)
    assert server.hits >= 4
    for one in plain:
        is_shown = str(one.x) in one.transcript or "upload" in call.name or "of 8" in call.name
        assert (one.failure, is_shown) == (None, True)
    found = []
    for mode in ("all", "none"):
        budget = Budget(calls=1000, tokens=1_000_000)
        with aggregator.cassette(tmp_path / "a.yaml", mode, clients="all", warn=False):
            result, rollouts = run(call, server.url, budget=budget)
        found.append((result.usage, [shown(one) for one in rollouts], budget.spent))
        assert result.usage["agent"].calls >= 4
        assert budget.spent.calls == result.usage["agent"].calls
    assert found[0] == found[1]
    if str(rollouts[0].output).startswith("answer"):
        assert all(str(one.output) in shown(one) for one in rollouts)


def test_an_sdks_429_is_not_the_agents_failure(call: Call, server: ModelServer) -> None:
    """Whatever the SDK raises, with or without retries, is an infrastructure failure without score and feedback."""
    if "stream" in call.name and call.package == "google-genai":
        pytest.skip("its retries are those of the call without a stream")
    if "Parallel" in call.name:
        pytest.skip("it hides errors, and the agent continues without an answer")
    server.status = 429
    with pytest.raises(aggregator.TrainingError, match=r"RateLimitError|429|slow down|lost"):
        run(call, server.url)


def test_a_budget_error_reaches_the_user(call: Call, server: ModelServer) -> None:
    """SDKs may wrap it or take it for a lost connection, but they do not retry it."""
    with pytest.raises(BudgetExceededError):
        run(call, server.url, budget=Budget(calls=2))
    assert server.hits <= 2


@pytest.mark.parametrize("package", ["openai", "anthropic"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_sdk_works_with_our_transport(package: str, backend: str, server: ModelServer, tmp_path: Path) -> None:
    """Without patches its calls are recorded, replayed, counted and refused, under trio too."""
    sdk = pytest.importorskip(package)
    httpx = sys.modules[sdk.DefaultAsyncHttpxClient.__mro__[1].__module__]  # or httpx2, which newer SDKs use
    anyio = pytest.importorskip("anyio")
    pytest.importorskip(backend)
    url = f"{server.url}/v1" if package == "openai" else server.url

    async def ask() -> str:
        http = httpx.AsyncClient(transport=aggregator.transport())
        kind = sdk.AsyncOpenAI if package == "openai" else sdk.AsyncAnthropic
        async with kind(api_key="sk-x", base_url=url, http_client=http, max_retries=0) as client:
            messages = [{"role": "user", "content": "Hi"}]
            if package == "openai":
                reply = await client.chat.completions.create(model="m", messages=messages)
                return str(reply.choices[0].message.content)
            reply = await client.messages.create(model="m", max_tokens=9, messages=messages)
            return str(reply.content[0].text)

    found = []
    for mode in ("all", "none"):
        with aggregator.cassette(tmp_path / "a.yaml", mode):
            found.append(anyio.run(ask, backend=backend))
    assert found == ["answer 1", "answer 1"]
    assert server.hits == 1
    budget = Budget(calls=1)
    with spending(budget), collecting() as ledger:
        anyio.run(ask, backend=backend)
        with pytest.raises(Exception, match="used up"):
            anyio.run(ask, backend=backend)
    assert (server.hits, ledger.totals()["agent"].calls, budget.spent.calls) == (2, 1, 1)


def test_a_lost_connection_of_an_sdk_is_not_the_agents_failure(call: Call) -> None:
    """The connection is refused, as by a server that is down."""
    if "Parallel" in call.name:
        pytest.skip("it hides errors, and the agent continues without an answer")
    with pytest.raises(aggregator.TrainingError, match="Connection|lost"):
        run(call, "http://127.0.0.1:9")
