"""The public fakes: a transport for the client, and a model."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from aggregator import LLM, Budget, lineage
from aggregator.errors import APIConnectionError, BudgetExceededError, ConfigError, RateLimitError
from aggregator.llm.budget import spending
from aggregator.records import Completion, HTTPReply, HTTPRequest
from aggregator.testing import FakeTransport, ScriptedModel, error_reply, stream_reply, suggestion, text_reply


def client(transport: FakeTransport, **options: Any) -> LLM:
    return LLM("openai/gpt-4o-mini", api_key="none", transport=transport, **options)


async def test_a_script_is_played_in_order_and_its_last_step_repeats() -> None:
    """Steps are replies, texts, errors and functions of the request; requests are recorded."""

    async def echo(request: HTTPRequest) -> str:
        return request.url

    transport = FakeTransport(
        "one", text_reply("two"), echo, lambda request: HTTPReply(status=500, body=b"", headers={})
    )
    llm = client(transport, max_attempts=1, timeout=5.0)
    texts = [(await llm.complete("Hi")).text for _ in range(3)]
    assert texts == ["one", "two", "https://api.openai.com/v1/chat/completions"]
    for _ in range(2):
        with pytest.raises(Exception, match="500"):
            await llm.complete("Hi")
    assert [body["messages"] for body in transport.bodies()] == [[{"role": "user", "content": "Hi"}]] * 5
    assert all(timeout is not None and 0 < timeout <= 5.0 for timeout in transport.timeouts)
    assert repr(transport) == "<FakeTransport: 4 steps, 5 requests>"


async def test_errors_of_a_provider_and_of_the_network() -> None:
    """A status is classified like a provider's; an exception is raised like a network error."""
    with pytest.raises(RateLimitError, match="slow down"):
        await client(FakeTransport(error_reply(429, "slow down")), max_attempts=1).complete("Hi")
    with pytest.raises(APIConnectionError, match="reset"):
        await client(FakeTransport(APIConnectionError("reset")), max_attempts=1).complete("Hi")


async def test_a_streamed_reply_arrives_in_its_pieces() -> None:
    """There is one delta for each piece, and the usage at the end."""
    stream = client(FakeTransport(stream_reply("hel", "lo"))).stream("Hi")
    assert [delta async for delta in stream] == ["hel", "lo"]


@pytest.mark.parametrize("make", [FakeTransport, ScriptedModel])
def test_an_empty_script_is_refused(make: Any) -> None:
    """It would have no answer."""
    with pytest.raises(ConfigError, match="^Expected at least one"):
        make()


async def test_a_step_without_an_answer_is_named() -> None:
    """For example a function without `return`."""
    with pytest.raises(ConfigError, match="Expected an HTTPReply, a text or an exception from the script, got None"):
        await FakeTransport(lambda request: None).send(HTTPRequest(url="http://localhost", body=b"", headers={}))


async def test_a_model_records_its_calls() -> None:
    """Messages, options, and the lineage of each call."""
    model = ScriptedModel({"answer": 3}, lambda messages: messages[-1]["content"].upper())
    with lineage("train", role="optimizer"):
        first = await model.complete([{"role": "user", "content": "hi"}], temperature=0)
    again = [(await model.complete([{"role": "user", "content": "hi"}])).text for _ in range(2)]
    assert (first.text, again) == ('{"answer": 3}', ["HI", "HI"])
    assert model.asked == [[{"role": "user", "content": "hi"}]] * 3
    assert model.options == [{"temperature": 0}, {}, {}]
    assert model.places == [("train", "optimizer"), ("", "agent"), ("", "agent")]
    assert repr(model) == "<ScriptedModel: 3 calls>"


@pytest.mark.parametrize("limits", [{"calls": 2}, {"tokens": 10_000}, {"usd": 1.0}])
async def test_a_model_counts_in_budgets(limits: dict[str, Any]) -> None:
    """Calls, tokens and cost are counted, as for a client."""
    model, budget = ScriptedModel("hello"), Budget(**limits)
    with spending(budget):
        for _ in range(2):
            await model.complete("Hi")
        assert (budget.spent.calls, budget.spent.tokens, round(budget.spent.usd, 3)) == (2, 30, 0.2)
        if "calls" in limits:
            with pytest.raises(BudgetExceededError):
                await model.complete("Hi")


async def test_accepted_replies() -> None:
    """A Completion is returned unchanged; an exception is raised, also one that a function returns."""
    whole = (await ScriptedModel("hello").complete("Hi")).choices
    model = ScriptedModel(Completion(choices=whole, id="x"), KeyError("x"), lambda messages: ValueError("y"))
    assert (await model.complete("Hi")).id == "x"
    with pytest.raises(KeyError):
        await model.complete("Hi")
    with pytest.raises(ValueError, match="y"):
        await model.complete("Hi")


def test_a_suggestion_is_an_optimizers_reply() -> None:
    """It is JSON with a reasoning and the new values."""
    assert suggestion(k=3) == '{"reasoning_all": "because", "suggestion": {"k": 3}}'


def test_importing_the_room_loads_nothing() -> None:
    """pytest loads the plugin in every project, so the fakes are loaded on first use."""
    script = (
        "import sys, aggregator.testing; assert not [m for m in sys.modules if m.startswith(('msgspec', 'aiohttp'))]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
