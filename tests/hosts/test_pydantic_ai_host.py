"""Our client as a pydantic-ai model: tools, structured answers, streams, cassettes, budgets, equal bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("pydantic_ai", reason="runs in the environment pydantic-ai of tests/environments.py")

from chat_replies import client, tool_reply, tool_stream
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.direct import model_request
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.settings import ToolOrOutput
from pydantic_ai.tools import ToolDefinition

from aggregator import LLM, Budget, cassette, exact_match, lineage, trainable
from aggregator.errors import APITimeoutError, BudgetExceededError, ConfigError, ModelWarning
from aggregator.hosts.pydantic_ai import model
from aggregator.records import HTTPRequest
from aggregator.simulation import SimulatedModel
from aggregator.testing import FakeTransport, ScriptedModel, stream_reply
from aggregator.training.optimize import aoptimize


class Team(BaseModel):
    name: str


def with_tool(llm: Any) -> Agent[None, str]:
    agent = Agent(model(llm), instructions="Route.", system_prompt="You are kind.")

    @agent.tool_plain
    def history(customer: str) -> str:
        """Return what a customer bought."""
        return f"{customer} bought a lamp"

    return agent


async def test_tools_are_offered_called_and_their_results_sent_back() -> None:
    llm, transport = client(tool_reply("history", {"customer": "Ada"}), "a lamp")
    result = await with_tool(llm).run("What did Ada buy?")
    first, second = transport.bodies()
    assert result.output == "a lamp"
    assert [tool["function"]["name"] for tool in first["tools"]] == ["history"]
    assert first["tools"][0]["function"]["description"] == "Return what a customer bought."
    assert second["messages"][-1] == {"role": "tool", "tool_call_id": "call-1", "content": "Ada bought a lamp"}
    assert json.loads(second["messages"][-2]["tool_calls"][0]["function"]["arguments"]) == {"customer": "Ada"}
    assert [one["content"] for one in second["messages"] if one["role"] == "system"] == ["Route.", "You are kind."]
    assert result.usage.requests == 2
    assert result.usage.input_tokens == 20


async def test_a_type_is_requested_as_a_required_output_tool() -> None:
    llm, transport = client(tool_reply("final_result", {"name": "billing"}))
    result = await Agent(model(llm), output_type=Team).run("the invoice")
    assert result.output == Team(name="billing")
    assert transport.bodies()[0]["tool_choice"] == "required"


async def test_native_output_is_a_response_format() -> None:
    llm, transport = client('{"name": "billing"}')
    result = await Agent(model(llm), output_type=NativeOutput(Team)).run("the invoice")
    assert result.output == Team(name="billing")
    assert transport.bodies()[0]["response_format"]["json_schema"]["schema"]["required"] == ["name"]


async def test_a_stream_yields_the_text_as_it_arrives() -> None:
    llm, _ = client(stream_reply("a ", "red ", "lamp"))
    async with Agent(model(llm)).run_stream("What?") as streamed:
        pieces = [piece async for piece in streamed.stream_text(delta=True, debounce_by=None)]
    assert pieces == ["a ", "red ", "lamp"]
    assert streamed.usage.output_tokens == 5


async def test_a_streamed_tool_call_is_executed() -> None:
    llm, transport = client(tool_stream("history", '{"customer": "Ada"}'), stream_reply("a ", "lamp"))
    async with with_tool(llm).run_stream("What did Ada buy?") as streamed:
        assert await streamed.get_output() == "a lamp"
    assert transport.bodies()[1]["messages"][-1]["content"] == "Ada bought a lamp"
    assert streamed.usage.input_tokens == 19


async def test_settings_are_sent_as_options_and_others_are_refused() -> None:
    llm, transport = client("fine")
    await Agent(model(llm)).run("Hi", model_settings={"seed": 7, "temperature": 0.5, "max_tokens": 9})
    sent = transport.bodies()[0]
    assert (sent["seed"], sent["temperature"]) == (7, 0.5)
    with pytest.raises(ConfigError, match="got top_k"):
        await Agent(model(llm)).run("Hi", model_settings={"top_k": 3})


@pytest.mark.parametrize(
    ("choice", "offered", "sent"),
    [
        ("auto", ["history", "stock"], "auto"),
        ("required", ["history", "stock"], "required"),
        ("none", ["history", "stock"], "none"),
        ([], ["history", "stock"], "none"),
        (["stock"], ["stock"], "required"),
        (ToolOrOutput(function_tools=["history"]), ["history"], "auto"),
    ],
    ids=str,
)
async def test_a_choice_of_tools_was_passed_on_as_it_was(choice: Any, offered: list[str], sent: str) -> None:
    """Names become the tools that are offered, as in pydantic-ai's own models."""
    llm, transport = client("a lamp")
    tools = [ToolDefinition(name=name) for name in ("history", "stock")]
    await model_request(
        model(llm),
        [ModelRequest.user_text_prompt("What did Ada buy?")],
        model_settings={"tool_choice": choice},
        model_request_parameters=ModelRequestParameters(function_tools=tools),
    )
    body = transport.bodies()[0]
    assert [tool["function"]["name"] for tool in body["tools"]] == offered
    assert body["tool_choice"] == sent


async def test_a_choice_of_no_tools_keeps_those_of_the_output() -> None:
    llm, transport = client(tool_reply("final_result", {"name": "billing"}))
    agent = Agent(model(llm), output_type=Team)

    @agent.tool_plain
    def history(customer: str) -> str:
        return customer

    await agent.run("the invoice", model_settings={"tool_choice": "none"})
    body = transport.bodies()[0]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["final_result"]
    assert body["tool_choice"] == "required"


async def test_the_setting_timeout_was_ignored() -> None:
    """A call that takes longer is cancelled, and so is the beginning of a stream."""
    ended: list[str] = []

    async def never(messages: Any) -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")
        return "late"

    agent = Agent(model(ScriptedModel(never)))
    with pytest.raises(APITimeoutError, match="timeout=0.05 s"):
        await agent.run("Hi", model_settings={"timeout": 0.05})
    assert ended == ["cancelled"]
    assert (await Agent(model(ScriptedModel("fine"))).run("Hi", model_settings={"timeout": 60})).output == "fine"
    with pytest.raises(ConfigError, match="timeout in seconds"):
        await agent.run("Hi", model_settings={"timeout": -1})


@pytest.mark.parametrize("setting", [{"parallel_tool_calls": False}, {"extra_headers": {"x-team": "a"}}], ids=str)
async def test_settings_that_are_left_out_are_warned_of(setting: Any) -> None:
    llm, _ = client("fine")
    with pytest.warns(ModelWarning, match=f"got {next(iter(setting))}, which is left out"):
        await Agent(model(llm)).run("Hi", model_settings=setting)


async def test_a_scripted_model_answers_and_cannot_stream() -> None:
    scripted = ScriptedModel("hello")
    assert (await Agent(model(scripted)).run("Hi")).output == "hello"
    with pytest.raises(ConfigError, match="has no stream"):
        async with Agent(model(scripted)).run_stream("Hi"):
            pass


async def test_a_budget_ends_the_run() -> None:
    transport = FakeTransport("fine")
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=transport, budget=Budget(calls=1))
    agent = Agent(model(llm))
    await agent.run("Hi")
    with pytest.raises(BudgetExceededError):
        await agent.run("Hi")


async def test_runs_with_tools_replay_exactly_in_any_order_of_answers(tmp_path: Path) -> None:
    count = iter(range(1000))

    async def answer(request: HTTPRequest) -> Any:
        sent = msgspec.json.decode(request.body)
        await asyncio.sleep(hash(request.body) % 7 / 1000)
        if sent["messages"][-1]["role"] == "tool":
            return f"answer {next(count)}"
        return tool_reply("history", {"customer": "Ada"}, call=f"call-{next(count)}")

    async def run(llm: LLM, mode: Any) -> list[str]:
        agent = with_tool(llm)

        async def one(i: int) -> str:
            with lineage(f"run={i}"):
                return (await agent.run("What did Ada buy?")).output

        with cassette(tmp_path / "tape.yaml", mode):
            return list(await asyncio.gather(*(one(i) for i in range(8))))  # noqa: TID251 - the order is the point

    recorded = await run(client(answer)[0], "all")
    assert await run(client(RuntimeError("asked"))[0], "none") == recorded


async def test_training_with_one_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    tickets = [("the invoice", "billing"), ("my parcel", "shipping"), ("a lamp", "sales"), ("your invoice", "billing")]

    async def train(url: str) -> bytes:
        llm = LLM("openai-compatible/simulated-1", base_url=url)
        agent = trainable(Agent(model(llm), instructions="If no rule applies, answer sales."))
        result = await aoptimize(agent, tickets, guide=exact_match, model=llm, seed=3, run_dir=False, show=False)
        return msgspec.json.encode(result, enc_hook=repr, order="deterministic")

    async with SimulatedModel(seed=1) as server:
        assert await train(server.base_url) == await train(server.base_url)
        assert server.calls["agent"] > 0
