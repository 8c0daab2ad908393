"""Agents of the OpenAI Agents SDK: which texts are trained, isolation, and what a transcript shows."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("agents.models", reason="runs in the environment openai-agents of tests/environments.py")

from agents import (
    Agent,
    FunctionTool,
    Model,
    ModelResponse,
    OpenAIChatCompletionsModel,
    Runner,
    Usage,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from aggregator import ParameterNode, as_agent, trainable
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.llm.observed import Observed
from aggregator.records import Rollout, RolloutTask, Sample
from aggregator.simulation import SimulatedModel

set_tracing_disabled(True)


def text(content: str) -> ResponseOutputMessage:
    part = ResponseOutputText(text=content, type="output_text", annotations=[])
    return ResponseOutputMessage(id="m", type="message", role="assistant", status="completed", content=[part])


def called(name: str, arguments: str = "{}", call: str = "call-1") -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(type="function_call", name=name, arguments=arguments, call_id=call)


class Scripted(Model):
    """Answers with the result of a function of (instructions, input, tools, handoffs)."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    async def get_response(self, **given: Any) -> ModelResponse:
        await asyncio.sleep(0)
        output = self.answer(given["system_instructions"], given["input"], given["tools"], given["handoffs"])
        return ModelResponse(
            output=[output], usage=Usage(requests=1, input_tokens=3, output_tokens=2), response_id=None
        )

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        raise NotImplementedError


def echo(instructions: str, items: Any, tools: Any, handoffs: Any) -> Any:
    """Answer with everything that the model got."""
    described = [f"{one.name}: {one.description}" for one in tools]
    return text(" | ".join([instructions, *described, *(one.tool_description for one in handoffs)]))


def uses_tool(instructions: str, items: Any, tools: Any, handoffs: Any) -> Any:
    """Call the first tool, then answer with its result."""
    outputs = [one["output"] for one in items if one.get("call_id") == "use" and "output" in one]
    return text(f"{instructions}: {outputs[-1]}") if outputs else called(tools[0].name, '{"input": "7"}', call="use")


def hands_over(instructions: str, items: Any, tools: Any, handoffs: Any) -> Any:
    return called(handoffs[0].tool_name) if handoffs else text(instructions)


@function_tool
def lookup(order: str) -> str:
    """Look up an order."""
    return f"order {order} is lost"


def fresh_tool() -> FunctionTool:
    async def invoke(context: Any, arguments: str) -> str:
        return f"found {arguments}"

    return FunctionTool(name="lookup", description="Look up.", params_json_schema={}, on_invoke_tool=invoke)


def triage(answer: Callable[..., Any] = echo) -> Agent[Any]:
    model = Scripted(answer)
    refunds = Agent(
        name="refunds", model=model, instructions="Pay.", handoff_description="For refunds.", tools=[fresh_tool()]
    )
    return Agent(name="triage", model=model, instructions="Route.", handoffs=[refunds], tools=[])


async def rollout(agent: Any, x: Any = "hello", **values: str) -> Rollout:
    given = {name.replace("__", "."): value for name, value in values.items()}
    task = RolloutTask(sample=Sample(0, x), values=given, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), None)(task)


def names(agent: Any) -> list[str]:
    return [parameter.name for parameter in agent.parameters()]


def test_all_agents_reached_by_handoffs_are_trained_with_tools_and_handoffs() -> None:
    assert names(trainable(triage())) == [
        "triage.instructions",
        "refunds.instructions",
        "refunds.handoff_description",
        "lookup.description",
    ]


async def test_every_text_reaches_the_model_under_the_values_of_the_rollout() -> None:
    agent = trainable(triage())
    found = await rollout(agent, triage__instructions="A.", refunds__handoff_description="B.")
    assert found.output == "A. | Handoff to the refunds agent to handle the request. B."
    over = await rollout(triage(hands_over), refunds__instructions="C.")
    assert over.output == "C."


async def test_concurrent_candidates_share_the_agents_and_keep_their_texts() -> None:
    host = triage(hands_over)
    host.handoffs[0].model = Scripted(echo)
    agent = trainable(host)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(rollout(agent, refunds__instructions=f"I{i}.", lookup__description=f"D{i}."))
            for i in range(16)
        ]
    assert [task.result().output for task in tasks] == [f"I{i}. | lookup: D{i}." for i in range(16)]


async def test_the_hosts_objects_hold_the_accepted_texts() -> None:
    host = triage()
    trainable(host).apply({"triage.instructions": "Trained.", "lookup.description": "Find."})
    assert host.instructions == "Trained."
    assert host.handoffs[0].tools[0].description == "Find."
    assert (await Runner.run(host, "hello")).final_output.startswith("Trained. | ")


def test_a_clone_of_a_trained_agent_is_independent() -> None:
    host = triage()
    trainable(host)
    clone = host.clone(instructions="Other.")
    assert (clone.instructions, host.instructions) == ("Other.", "Route.")
    assert type(host).__name__ == "Agent"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_of_an_adapted_agent_holds_its_own_texts(copied: Callable[[Any], Any]) -> None:
    host = Agent(name="triage", instructions="Route.")
    agent = trainable(host)
    other = copied(host)
    agent.apply({"triage.instructions": "Trained."})
    assert other.instructions == "Route."
    trainable(other).apply({"triage.instructions": "Other."})
    assert (host.instructions, other.instructions) == ("Trained.", "Other.")


async def test_an_agent_used_as_a_tool_is_trained() -> None:
    inner = Agent(name="inner", model=Scripted(echo), instructions="Inner.")
    outer = Agent(
        name="outer", model=Scripted(uses_tool), instructions="Outer.", tools=[inner.as_tool("ask_inner", "Ask.")]
    )
    agent = trainable(outer)
    assert names(agent) == ["outer.instructions", "inner.instructions", "ask_inner.description"]
    found = await rollout(agent, inner__instructions="New.")
    assert found.output == "Outer.: New."


async def test_an_agent_that_a_tools_function_runs_is_trained() -> None:
    inner = Agent(name="inner", model=Scripted(echo), instructions="Inner.")

    @function_tool
    async def ask(input: str) -> str:  # noqa: A002 - what the scripted model passes
        """Ask."""
        return str((await Runner.run(inner, input)).final_output)

    outer = Agent(name="outer", model=Scripted(uses_tool), instructions="Outer.", tools=[ask])
    found = await rollout(trainable(outer), inner__instructions="New.")
    assert found.output == "Outer.: New."


def test_a_handoff_object_has_a_description_to_train() -> None:
    refunds = Agent(name="refunds", model=Scripted(echo), instructions="Pay.")
    host = Agent(
        name="triage", instructions="Route.", handoffs=[handoff(refunds, tool_description_override="Pay back.")]
    )
    assert names(trainable(host)) == [
        "triage.instructions",
        "refunds.instructions",
        "transfer_to_refunds.description",
    ]


def test_two_agents_with_one_name_are_refused() -> None:
    host = Agent(name="twin", instructions="a", handoffs=[Agent(name="twin", instructions="b")])
    with pytest.raises(ConfigError, match=r"twin\.instructions"):
        trainable(host)


def test_tools_with_one_name_are_distinguished_by_their_agents() -> None:
    host = Agent(name="a", instructions="a", tools=[fresh_tool()])
    host.handoffs.append(Agent(name="b", instructions="b", tools=[fresh_tool()]))
    assert names(trainable(host))[2:] == ["a.lookup.description", "b.lookup.description"]


def test_an_agent_without_a_fixed_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected an Agent with a text that can be trained"):
        trainable(Agent(name="bare", instructions=lambda context, agent: "made"))


async def test_the_context_is_given_or_made_from_the_input() -> None:
    host = Agent(name="bare", model=Scripted(echo), instructions=lambda context, agent: f"For {context.context}.")
    host.tools.append(fresh_tool())
    assert (await rollout(trainable(host, context=str.upper), "ada")).output == "For ADA. | lookup: Look up."


async def test_tools_handoffs_and_calls_of_models_are_in_the_transcript_in_their_order() -> None:
    host = triage(hands_over)
    host.handoffs[0].model = Scripted(uses_tool)
    lines = (await rollout(host)).transcript.splitlines()
    seen = [line for line in lines if line.startswith(("LLM call", "tool ", "handoff "))]
    assert seen == ["LLM call", "handoff from triage", "LLM call", "tool lookup", "LLM call"]
    assert any(line.startswith('  returned: "found ') for line in lines)


async def test_an_observed_call_is_in_the_transcript_once() -> None:
    async with SimulatedModel() as server, AsyncOpenAI(base_url=server.base_url, api_key="none") as openai:
        asking = OpenAIChatCompletionsModel("gpt-4o-mini", openai)
        host = Agent(name="route", model=asking, instructions="If no rule applies, answer sales.")
        with Observed("all").watching():
            found = await rollout(host)
    assert found.output == "sales"
    assert found.transcript.count("LLM call") == 1
    assert "  reply: sales" in found.transcript


async def test_saved_values_apply_inside_applied_only(tmp_path: Path) -> None:
    host = triage()
    agent = trainable(host)
    agent.apply({"triage.instructions": "Trained."})
    agent.save(tmp_path / "triage.json")
    agent.apply({"triage.instructions": "Plain."})
    with agent.applied(tmp_path / "triage.json") as program:
        assert (await Runner.run(program, "hello")).final_output.startswith("Trained.")
    assert (await Runner.run(host, "hello")).final_output.startswith("Plain.")


def test_an_agent_is_adapted_twice_with_the_same_parameters() -> None:
    host = triage()
    first, second = trainable(host), trainable(host)
    first.apply({"triage.instructions": "Once."})
    assert second.parameters()[0].data == "Once."
    assert lookup.description == "Look up an order."


async def test_a_node_that_instructions_and_tools_read_was_not_found() -> None:
    """An agent whose instructions are a function was refused; concurrent candidates each have their own text."""
    rule, hint = ParameterNode("Route.", name="rule"), ParameterNode("none")

    @function_tool
    def lookup(input: str) -> str:  # noqa: A002 - as the model calls it
        """Look up an order."""
        return hint.data

    agent = Agent(name="a", model=Scripted(uses_tool), instructions=lambda context, agent: rule.data, tools=[lookup])
    assert names(trainable(agent)) == ["lookup.description", "rule", "hint"]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, rule=f"R{i}", hint=f"H{i}")) for i in range(8)]
    assert [task.result().output for task in tasks] == [f"R{i}: H{i}" for i in range(8)]
