"""Our client as a LangChain chat model: tools, structured answers, streams, cassettes, budgets, equal bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("langchain.agents", reason="runs in the environment langchain of tests/environments.py")

from chat_replies import client, tool_reply, tool_stream
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from aggregator import LLM, Budget, cassette, exact_match, lineage, trainable
from aggregator.errors import BudgetExceededError, ConfigError
from aggregator.hosts.langchain import model
from aggregator.records import HTTPRequest
from aggregator.simulation import SimulatedModel
from aggregator.testing import FakeTransport, ScriptedModel, stream_reply
from aggregator.training.optimize import aoptimize


class Team(BaseModel):
    """The team that answers."""

    name: str


@tool
def history(customer: str) -> str:
    """Return what a customer bought."""
    return f"{customer} bought a lamp"


async def test_an_agents_tools_are_offered_called_and_their_results_sent_back() -> None:
    llm, transport = client(tool_reply("history", {"customer": "Ada"}), "a lamp")
    agent = create_agent(model(llm), tools=[history], system_prompt="Route.")
    found = await agent.ainvoke({"messages": ["What did Ada buy?"]})
    first, second = transport.bodies()
    assert found["messages"][-1].text == "a lamp"
    assert found["messages"][-1].usage_metadata["input_tokens"] == 10
    assert first["messages"][0] == {"role": "system", "content": "Route."}
    assert first["tools"][0]["function"]["description"] == "Return what a customer bought."
    assert second["messages"][-1] == {"role": "tool", "tool_call_id": "call-1", "content": "Ada bought a lamp"}


def test_synchronous_calls() -> None:
    """`invoke` works as `ainvoke` does."""
    llm, _ = client("fine")
    assert model(llm).invoke("Hi").text == "fine"


async def test_a_type_is_requested_as_a_required_tool_call() -> None:
    llm, transport = client(tool_reply("Team", {"name": "billing"}))
    assert await model(llm).with_structured_output(Team).ainvoke("the invoice") == Team(name="billing")
    assert transport.bodies()[0]["tool_choice"] in ("required", {"type": "function", "function": {"name": "Team"}})


async def test_an_agents_response_format_is_its_structured_response() -> None:
    llm, _ = client(tool_reply("Team", {"name": "billing"}))
    agent = create_agent(model(llm), tools=[], response_format=Team)
    assert (await agent.ainvoke({"messages": ["the invoice"]}))["structured_response"] == Team(name="billing")


async def test_arguments_that_are_not_json_are_an_invalid_call() -> None:
    llm, _ = client(tool_reply("history", '{"customer": '))
    answer = await model(llm).bind_tools([history]).ainvoke("Hi")
    assert answer.tool_calls == []
    assert answer.invalid_tool_calls[0]["args"] == '{"customer": '


async def test_a_stream_yields_the_text_as_it_arrives() -> None:
    llm, _ = client(stream_reply("a ", "red ", "lamp"))
    pieces = [piece async for piece in model(llm).astream("What?")]
    assert [piece.text for piece in pieces if piece.text] == ["a ", "red ", "lamp"]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    assert whole.usage_metadata["output_tokens"] == 5


async def test_a_streamed_tool_call_is_executed() -> None:
    llm, transport = client(tool_stream("history", '{"customer": "Ada"}'), stream_reply("a ", "lamp"))
    agent = create_agent(model(llm), tools=[history])
    pieces = [piece async for piece, _ in agent.astream({"messages": ["What did Ada buy?"]}, stream_mode="messages")]
    assert [piece.text for piece in pieces if piece.type == "AIMessageChunk" and piece.text] == ["a ", "lamp"]
    assert transport.bodies()[1]["messages"][-1]["content"] == "Ada bought a lamp"


async def test_options_of_the_call_are_sent_and_others_are_refused() -> None:
    llm, transport = client("fine")
    await model(llm, seed=7).bind(temperature=0.5, extra={"user": "u"}).ainvoke([HumanMessage("Hi")], stop=["."])
    sent = transport.bodies()[0]
    assert (sent["seed"], sent["temperature"], sent["user"], sent["stop"]) == (7, 0.5, "u", ["."])
    with pytest.raises(ConfigError, match="got top_k"):
        model(llm, top_k=3)
    with pytest.raises(ConfigError, match="got top_k"):
        await model(llm).bind(top_k=3).ainvoke("Hi")


async def test_a_scripted_model_answers_and_cannot_stream() -> None:
    assert (await model(ScriptedModel("hello")).ainvoke("Hi")).text == "hello"
    with pytest.raises(ConfigError, match="has no stream"):
        _ = [piece async for piece in model(ScriptedModel("hello")).astream("Hi")]


async def test_a_budget_ends_the_run() -> None:
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=FakeTransport("fine"), budget=Budget(calls=1))
    await model(llm).ainvoke("Hi")
    with pytest.raises(BudgetExceededError):
        await model(llm).ainvoke("Hi")


async def test_runs_with_tools_replay_exactly_in_any_order_of_answers(tmp_path: Path) -> None:
    count = iter(range(1000))

    async def answer(request: HTTPRequest) -> Any:
        sent = msgspec.json.decode(request.body)
        await asyncio.sleep(next(count) % 7 / 1000)
        if sent["messages"][-1]["role"] == "tool":
            return f"answer {next(count)}"
        return tool_reply("history", {"customer": "Ada"}, call=f"call-{next(count)}")

    async def run(llm: LLM, mode: Any) -> list[str]:
        agent = create_agent(model(llm), tools=[history], system_prompt="Route.")

        async def one(i: int) -> str:
            with lineage(f"run={i}"):
                return str((await agent.ainvoke({"messages": ["What did Ada buy?"]}))["messages"][-1].text)

        with cassette(tmp_path / "tape.yaml", mode):
            return list(await asyncio.gather(*(one(i) for i in range(8))))  # noqa: TID251 - the order is the point

    recorded = await run(client(answer)[0], "all")
    assert await run(client(RuntimeError("asked"))[0], "none") == recorded


async def test_training_with_one_seed_gives_the_same_bytes() -> None:
    tickets = [("the invoice", "billing"), ("my parcel", "shipping"), ("a lamp", "sales"), ("your invoice", "billing")]

    async def train(url: str) -> bytes:
        llm = LLM("openai-compatible/simulated-1", base_url=url)
        agent = trainable(create_agent(model(llm), tools=[], system_prompt="If no rule applies, answer sales."))
        result = await aoptimize(agent, tickets, guide=exact_match, model=llm, seed=3, run_dir=False, show=False)
        return msgspec.json.encode(result, enc_hook=repr, order="deterministic")

    async with SimulatedModel(seed=1) as server:
        assert await train(server.base_url) == await train(server.base_url)
        assert server.calls["agent"] > 0
