"""Our client as a model of the OpenAI Agents SDK: tools, handoffs, streams, cassettes, budgets, equal bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("agents.models", reason="runs in the environment openai-agents of tests/environments.py")

from agents import Agent, ModelSettings, RunConfig, Runner, function_tool, set_tracing_disabled
from chat_replies import client, tool_reply, tool_stream
from pydantic import BaseModel

from aggregator import LLM, Budget, cassette, exact_match, lineage, trainable
from aggregator.errors import BudgetExceededError, ConfigError
from aggregator.hosts.openai_agents import model, provider
from aggregator.records import HTTPRequest
from aggregator.simulation import SimulatedModel
from aggregator.testing import FakeTransport, ScriptedModel, stream_reply
from aggregator.training.optimize import aoptimize

set_tracing_disabled(True)


class Team(BaseModel):
    name: str


@function_tool
def history(customer: str) -> str:
    """Return what a customer bought."""
    return f"{customer} bought a lamp"


def with_tool(llm: Any) -> Agent[Any]:
    return Agent(name="support", model=model(llm), instructions="Route.", tools=[history])


async def test_tools_are_offered_called_and_their_results_sent_back() -> None:
    llm, transport = client(tool_reply("history", {"customer": "Ada"}), "a lamp")
    result = await Runner.run(with_tool(llm), "What did Ada buy?")
    first, second = transport.bodies()
    assert result.final_output == "a lamp"
    assert first["messages"][0] == {"role": "system", "content": "Route."}
    assert first["tools"][0]["function"]["description"] == "Return what a customer bought."
    assert second["messages"][-1] == {"role": "tool", "tool_call_id": "call-1", "content": "Ada bought a lamp"}
    assert result.context_wrapper.usage.input_tokens == 20


async def test_a_handoff_is_a_tool_that_leads_to_the_other_agent() -> None:
    llm, transport = client(tool_reply("transfer_to_refunds", {}), "paid")
    refunds = Agent(name="refunds", model=model(llm), instructions="Pay.")
    result = await Runner.run(Agent(name="triage", model=model(llm), instructions="R.", handoffs=[refunds]), "refund")
    assert (result.final_output, result.last_agent.name) == ("paid", "refunds")
    assert transport.bodies()[1]["messages"][0] == {"role": "system", "content": "Pay."}


async def test_a_type_is_requested_as_a_response_format() -> None:
    llm, transport = client('{"name": "billing"}')
    agent = Agent(name="route", model=model(llm), output_type=Team)
    assert (await Runner.run(agent, "the invoice")).final_output == Team(name="billing")
    assert transport.bodies()[0]["response_format"]["json_schema"]["schema"]["required"] == ["name"]


async def test_a_stream_yields_the_text_as_it_arrives() -> None:
    llm, _ = client(stream_reply("a ", "red ", "lamp"))
    result = Runner.run_streamed(Agent(name="s", model=model(llm)), "What?")
    pieces = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert pieces == ["a ", "red ", "lamp"]
    assert result.final_output == "a red lamp"
    assert result.context_wrapper.usage.output_tokens == 5


async def test_a_streamed_tool_call_is_executed() -> None:
    llm, transport = client(tool_stream("history", '{"customer": "Ada"}'), stream_reply("a ", "lamp"))
    result = Runner.run_streamed(with_tool(llm), "What did Ada buy?")
    _ = [event async for event in result.stream_events()]
    assert result.final_output == "a lamp"
    assert transport.bodies()[1]["messages"][-1]["content"] == "Ada bought a lamp"
    assert result.context_wrapper.usage.input_tokens == 19


async def test_settings_are_sent_as_options_and_others_are_refused() -> None:
    llm, transport = client("fine")
    settings = ModelSettings(temperature=0.5, extra_args={"seed": 7}, extra_body={"user": "u"}, presence_penalty=0.1)
    await Runner.run(Agent(name="s", model=model(llm), model_settings=settings), "Hi")
    sent = transport.bodies()[0]
    assert (sent["seed"], sent["temperature"], sent["user"], sent["presence_penalty"]) == (7, 0.5, "u", 0.1)
    with pytest.raises(ConfigError, match="got top_logprobs"):
        await Runner.run(Agent(name="s", model=model(llm), model_settings=ModelSettings(top_logprobs=3)), "Hi")


async def test_a_provider_makes_one_client_for_each_name() -> None:
    asked: list[str | None] = []

    def make(name: str | None) -> ScriptedModel:
        asked.append(name)
        return ScriptedModel(f"I am {name}")

    config = RunConfig(model_provider=provider(make))
    agents = [Agent(name="a", model="small"), Agent(name="b", model="large"), Agent(name="c", model="small")]
    answers = [(await Runner.run(agent, "Hi", run_config=config)).final_output for agent in agents]
    assert answers == ["I am small", "I am large", "I am small"]
    assert asked == ["small", "large"]


async def test_a_budget_ends_the_run() -> None:
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=FakeTransport("fine"), budget=Budget(calls=1))
    agent = Agent(name="s", model=model(llm))
    await Runner.run(agent, "Hi")
    with pytest.raises(BudgetExceededError):
        await Runner.run(agent, "Hi")


async def test_runs_with_tools_replay_exactly_in_any_order_of_answers(tmp_path: Path) -> None:
    count = iter(range(1000))

    async def answer(request: HTTPRequest) -> Any:
        sent = msgspec.json.decode(request.body)
        await asyncio.sleep(next(count) % 7 / 1000)
        if sent["messages"][-1]["role"] == "tool":
            return f"answer {next(count)}"
        return tool_reply("history", {"customer": "Ada"}, call=f"call-{next(count)}")

    async def run(llm: LLM, mode: Any) -> list[str]:
        agent = with_tool(llm)

        async def one(i: int) -> str:
            with lineage(f"run={i}"):
                return (await Runner.run(agent, "What did Ada buy?")).final_output

        with cassette(tmp_path / "tape.yaml", mode):
            return list(await asyncio.gather(*(one(i) for i in range(8))))  # noqa: TID251 - the order is the point

    recorded = await run(client(answer)[0], "all")
    assert await run(client(RuntimeError("asked"))[0], "none") == recorded


async def test_training_with_one_seed_gives_the_same_bytes() -> None:
    tickets = [("the invoice", "billing"), ("my parcel", "shipping"), ("a lamp", "sales"), ("your invoice", "billing")]

    async def train(url: str) -> bytes:
        llm = LLM("openai-compatible/simulated-1", base_url=url)
        agent = trainable(Agent(name="route", model=model(llm), instructions="If no rule applies, answer sales."))
        result = await aoptimize(agent, tickets, guide=exact_match, model=llm, seed=3, run_dir=False, show=False)
        return msgspec.json.encode(result, enc_hook=repr, order="deterministic")

    async with SimulatedModel(seed=1) as server:
        assert await train(server.base_url) == await train(server.base_url)
        assert server.calls["agent"] > 0
