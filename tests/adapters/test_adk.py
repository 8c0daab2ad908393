"""Google ADK agents: which texts are trained, how concurrent candidates are kept apart, and what a transcript shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

pytest.importorskip("google.adk", reason="runs in the environment adk of tests/environments.py")

from google.adk.agents import LlmAgent, SequentialAgent
from google.adk.models.base_llm import BaseLlm
from google.adk.models.llm_response import LlmResponse
from google.adk.tools.agent_tool import AgentTool
from google.genai import types

from aggregator import ParameterNode, as_agent, trainable
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.records import Rollout, RolloutTask, Sample

pytestmark = pytest.mark.filterwarnings("ignore")


class Scripted(BaseLlm):
    """Answers with its system instruction and the input, or with `reply`."""

    model: str = "scripted"
    reply: Any = None

    async def generate_content_async(self, llm_request: Any, stream: bool = False) -> AsyncGenerator[LlmResponse, None]:
        await asyncio.sleep(0)
        parts = None if self.reply is None else self.reply(llm_request)
        if parts is None:
            parts = [types.Part(text=str(llm_request.config.system_instruction))]
        yield LlmResponse(content=types.Content(role="model", parts=parts))


def call(name: str, **args: Any) -> list[types.Part]:
    return [types.Part(function_call=types.FunctionCall(name=name, args=args, id=f"call-{name}"))]


def returned(request: Any) -> Any:
    """Return the result of the latest function call, or None."""
    for content in reversed(request.contents):
        for part in content.parts or ():
            if part.function_response:
                return part.function_response.response
    return None


def names(agent: Any) -> list[str]:
    return [parameter.name for parameter in agent.parameters()]


async def rollout(agent: Any, x: Any = "hello", **values: str) -> Rollout:
    given = {name.replace("__", "."): value for name, value in values.items()}
    task = RolloutTask(sample=Sample(0, x), values=given, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), None)(task)


def greeter(**options: Any) -> LlmAgent:
    return LlmAgent(name="greeter", model=Scripted(), instruction="Greet {who?}.", **options)


def test_texts_of_all_agents_of_the_tree_are_parameters() -> None:
    """These are texts of sub-agents and of agents used as tools; a description is trained if another agent reads it."""
    inner = LlmAgent(name="inner", model=Scripted(), instruction="Look.", description="Looks things up.")
    below = LlmAgent(name="below", model=Scripted(), instruction=lambda context: "made", description="Helps.")
    root = LlmAgent(
        name="root",
        model=Scripted(),
        instruction="Route.",
        description="The root.",
        sub_agents=[below],
        tools=[AgentTool(inner)],
    )
    assert names(trainable(root)) == ["root.instruction", "below.description", "inner.instruction", "inner.description"]


async def test_every_candidate_runs_with_its_own_texts() -> None:
    """Concurrent candidates each have a clone; ADK still fills in the session's state; the host's is unchanged."""
    host = greeter()
    agent = trainable(host, state={"who": "Ada"})
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, greeter__instruction=f"Say {i} to {{who}}.")) for i in range(16)]
    for i, task in enumerate(tasks):
        assert f"Say {i} to Ada." in task.result().output
    assert host.instruction == "Greet {who?}."


async def test_accepted_values_are_in_the_hosts_agents() -> None:
    below = LlmAgent(name="below", model=Scripted(), instruction="Help.")
    root = SequentialAgent(name="root", sub_agents=[greeter(), below])
    trainable(root).apply({"greeter.instruction": "A.", "below.instruction": "B."})
    assert [agent.instruction for agent in root.sub_agents] == ["A.", "B."]


async def test_a_handoff_reaches_the_trained_sub_agent() -> None:
    def hand_over(request: Any) -> Any:
        return call("transfer_to_agent", agent_name="refunds") if returned(request) is None else None

    refunds = LlmAgent(name="refunds", model=Scripted(), instruction="Refund.", description="Refunds.")
    root = LlmAgent(name="root", model=Scripted(reply=hand_over), instruction="Route.", sub_agents=[refunds])
    found = await rollout(trainable(root), refunds__instruction="Refund gladly.")
    assert "Refund gladly." in found.output
    assert "transfer_to_agent" in found.transcript
    assert refunds.parent_agent is root


async def test_an_agent_that_is_a_tool_runs_with_the_candidates_text() -> None:
    def ask_inner(request: Any) -> Any:
        found = returned(request)
        return call("inner", request="why") if found is None else [types.Part(text=str(found))]

    inner = LlmAgent(name="inner", model=Scripted(), instruction="Look.", description="Looks.")
    root = LlmAgent(name="root", model=Scripted(reply=ask_inner), instruction="Ask.", tools=[AgentTool(inner)])
    found = await rollout(trainable(root), inner__instruction="Look closely.")
    assert "Look closely." in found.output
    assert inner.instruction == "Look."


async def test_a_transcript_shows_tools_and_calls_of_the_model() -> None:
    def history(customer: str) -> dict[str, str]:
        """Return what a customer bought."""
        return {"bought": f"a lamp for {customer}"}

    def use_tool(request: Any) -> Any:
        found = returned(request)
        return call("history", customer="Ann") if found is None else [types.Part(text=f"It was {found['bought']}.")]

    agent = LlmAgent(name="root", model=Scripted(reply=use_tool), instruction="Look it up.", tools=[history])
    found = await rollout(trainable(agent), "what did Ann buy")
    assert found.output == "It was a lamp for Ann."
    for part in ("history", "customer", "a lamp for Ann", "Look it up.", "what did Ann buy"):
        assert part in found.transcript


async def test_an_error_of_the_model_is_the_agents_failure() -> None:
    class Broken(BaseLlm):
        model: str = "broken"

        async def generate_content_async(self, llm_request: Any, stream: bool = False) -> Any:
            yield LlmResponse(error_code="SAFETY", error_message="blocked")

    found = await rollout(trainable(LlmAgent(name="root", model=Broken(), instruction="Go.")))
    assert found.failure is not None
    assert found.failure.message == "SAFETY: blocked"


def test_agents_without_a_trainable_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="with a text that can be trained, got none"):
        trainable(LlmAgent(name="root", model=Scripted(), instruction=lambda context: "made"))
    one = LlmAgent(name="same", model=Scripted(), instruction="A.")
    other = LlmAgent(name="same", model=Scripted(), instruction="B.")
    with pytest.raises(ConfigError, match="several named same"):
        trainable(LlmAgent(name="root", model=Scripted(), tools=[AgentTool(one), AgentTool(other)]))
    with pytest.raises(ConfigError, match="Expected the options state for LlmAgent, got stat"):
        trainable(greeter(), stat={})


async def test_an_output_schema_gives_the_object() -> None:
    from pydantic import BaseModel

    class Team(BaseModel):
        team: str

    answer = Scripted(reply=lambda request: [types.Part(text='{"team": "sales"}')])
    agent = LlmAgent(name="root", model=answer, instruction="Route.", output_schema=Team)
    assert (await rollout(trainable(agent))).output == {"team": "sales"}


async def test_a_node_that_an_instruction_provider_reads_was_not_found() -> None:
    """An agent whose instruction is a function was refused; concurrent candidates each have their own text."""
    rule = ParameterNode("Route.", name="rule")
    agent = LlmAgent(name="a", model=Scripted(), instruction=lambda context: rule.data)
    assert names(trainable(agent)) == ["rule"]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, rule=f"R{i}")) for i in range(8)]
    assert [task.result().output.splitlines()[0] for task in tasks] == [f"R{i}" for i in range(8)]
