"""pydantic-ai agents: which texts are trained, how candidates are kept apart, and what a transcript shows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic_ai", reason="runs in the environment pydantic-ai of tests/environments.py")

from openai import AsyncOpenAI
from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import InstructionPart, ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from aggregator import ParameterNode, as_agent, trainable
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.llm.observed import Observed
from aggregator.records import Rollout, RolloutTask, Sample
from aggregator.simulation import SimulatedModel


def echo(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Answer with everything that the model got: system prompts, instructions, descriptions of tools."""
    prompts = [part.content for m in messages for part in m.parts if part.part_kind == "system-prompt"]
    tools = [f"{tool.name}: {tool.description}" for tool in info.function_tools]
    return ModelResponse([TextPart(" | ".join([*prompts, info.instructions or "", *tools]))])


def calls_tool(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the first tool, then answer with its result."""
    returned = [part.content for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
    if returned:
        return ModelResponse([TextPart(f"{info.instructions}: {returned[0]}")])
    return ModelResponse([ToolCallPart(info.function_tools[0].name, {"question": "why"}, tool_call_id="call-1")])


async def rollout(agent: Any, x: Any = "hello", guide: Any = None, **values: str) -> Rollout:
    given = {name.replace("__", "."): value for name, value in values.items()}
    task = RolloutTask(sample=Sample(0, x), values=given, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), guide)(task)


def names(agent: Any) -> list[str]:
    return [parameter.name for parameter in agent.parameters()]


def support(model: Any = echo) -> Agent[None, str]:
    agent = Agent(
        FunctionModel(model),
        instructions=["Be brief.", InstructionPart("Never swear.", name="limits")],
        system_prompt="You route tickets.",
    )

    @agent.instructions
    def today() -> str:
        return "It is Monday."

    @agent.tool_plain
    def history(question: str) -> str:
        """Return what a customer bought."""
        return f"a lamp, {question}"

    return agent


def test_instructions_system_prompts_and_descriptions_of_tools_are_parameters() -> None:
    assert names(trainable(support())) == [
        "instructions",
        "instructions.limits",
        "system_prompt",
        "history.description",
    ]


async def test_every_text_reaches_the_model_under_the_values_of_the_rollout() -> None:
    values = {"instructions": "A.", "instructions__limits": "B.", "system_prompt": "C.", "history__description": "D."}
    agent = support()
    found = await rollout(agent, **values)
    assert found.output == "C. | A.\n\nB.\n\nIt is Monday. | history: D."
    assert (await agent.run("hello")).output == (
        "You route tickets. | Be brief.\n\nNever swear.\n\nIt is Monday. | history: Return what a customer bought."
    )


async def test_accepted_values_are_in_the_hosts_agent() -> None:
    agent = support()
    adapted = trainable(agent)
    adapted.apply({name: f"{name}!" for name in names(adapted)})
    found = await agent.run("hello")
    assert found.output == (
        "system_prompt! | instructions!\n\ninstructions.limits!\n\nIt is Monday. | history: history.description!"
    )


async def test_concurrent_candidates_share_one_agent_and_keep_their_texts() -> None:
    agent = trainable(support())
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                rollout(agent, instructions=f"I{i}.", system_prompt=f"S{i}.", history__description=f"D{i}.")
            )
            for i in range(16)
        ]
    for i, task in enumerate(tasks):
        assert task.result().output == f"S{i}. | I{i}.\n\nNever swear.\n\nIt is Monday. | history: D{i}."


async def test_an_agent_that_a_tool_calls_is_trained_under_its_name() -> None:
    refunds = Agent(FunctionModel(echo), instructions="Handle refunds.")
    front = Agent(FunctionModel(calls_tool), instructions="Route.")

    async def ask_refunds(question: str) -> str:
        return (await refunds.run(question)).output

    @front.tool_plain
    async def refund(question: str) -> str:
        return await ask_refunds(question)

    adapted = trainable(front)
    assert names(adapted) == ["instructions", "refunds.instructions"]
    assert (await rollout(adapted, refunds__instructions="Pay.")).output == "Route.: Pay."


def test_two_agents_with_one_name_are_refused() -> None:
    others = [Agent(FunctionModel(echo), name="twin", instructions=text) for text in ("a", "b")]
    with pytest.raises(ConfigError, match=r"twin\.instructions"):
        trainable(support(), agents=others)


def test_an_agent_without_a_fixed_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected an Agent with a text that can be trained"):
        trainable(Agent(FunctionModel(echo)))


async def test_dependencies_are_given_or_made_from_the_input() -> None:
    agent = Agent(FunctionModel(echo), deps_type=str, instructions="Answer.")

    @agent.instructions
    def who(context: RunContext[str]) -> str:
        return f"The customer is {context.deps}."

    assert (await rollout(trainable(agent, deps="Ada"))).output == "Answer.\n\nThe customer is Ada."
    assert (await rollout(trainable(agent, deps=str.upper), "bob")).output == "Answer.\n\nThe customer is BOB."


async def test_without_an_observed_client_the_history_is_the_transcript_with_tools() -> None:
    found = await rollout(support(calls_tool))
    assert 'tool call: history({"question":"why"})' in found.transcript
    assert "a lamp, why" in found.transcript
    assert found.transcript.count("LLM call") == 2


async def test_an_observed_call_is_in_the_transcript_once() -> None:
    async with SimulatedModel() as server, AsyncOpenAI(base_url=server.base_url, api_key="none") as openai:
        asking = OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(openai_client=openai))
        with Observed("all").watching():
            found = await rollout(Agent(asking, instructions="If no rule applies, answer sales."))
    assert found.output == "sales"
    assert found.transcript.count("LLM call") == 1
    assert "  reply: sales" in found.transcript


async def test_a_run_that_fails_keeps_its_transcript() -> None:
    def fail(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if messages[-1].parts[0].part_kind == "tool-return":
            raise RuntimeError("no more")
        return calls_tool(messages, info)

    found = await rollout(support(fail), guide=lambda _x, _output, _info: 1.0)
    assert found.failure is not None
    assert found.failure.error == "RuntimeError"
    assert "tool call: history" in found.transcript


async def test_structured_outputs_reach_the_guide_unchanged() -> None:
    @dataclass
    class Team:
        name: str

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse([ToolCallPart(info.output_tools[0].name, {"name": "billing"})])

    agent = Agent(FunctionModel(answer), output_type=Team, instructions="Route.")
    assert (await rollout(agent, guide=lambda _x, output, _info: float(output.name == "billing"))).score == 1.0


async def test_saved_values_apply_inside_applied_only(tmp_path: Path) -> None:
    agent = support()
    adapted = trainable(agent)
    adapted.apply({"system_prompt": "Trained."})
    adapted.save(tmp_path / "support.json")
    adapted.apply({"system_prompt": "Plain."})
    with trainable(agent).applied(tmp_path / "support.json"):
        assert (await agent.run("hello")).output.startswith("Trained. | ")
    assert (await agent.run("hello")).output.startswith("Plain. | ")


async def test_the_trained_values_are_written_into_another_agent() -> None:
    trained, other = trainable(support()), support()
    trained.apply({"instructions": "New."})
    trained.apply(other)
    assert "New." in (await other.run("hello")).output


def test_the_hosts_parameters_are_parameter_nodes() -> None:
    """An optimizer can be given some of them: `LLMOptimizer(parameters=[...])`."""
    assert all(isinstance(parameter, ParameterNode) for parameter in trainable(support()).parameters())


async def test_a_node_that_a_function_of_an_agent_reads_was_not_found() -> None:
    """An agent without a fixed text was refused; nodes are found in instructions, system prompts and tools."""
    rule, style, hint = (
        ParameterNode("Route.", name="rule"),
        ParameterNode("Be kind.", name="style"),
        ParameterNode("-"),
    )
    agent = Agent(FunctionModel(calls_tool))

    @agent.instructions
    def dynamic() -> str:
        return rule.data

    @agent.system_prompt
    async def system() -> str:
        return style.data

    @agent.tool_plain
    def lookup(question: str) -> str:
        return hint.data

    assert names(trainable(agent)) == ["rule", "style", "hint"]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, rule=f"R{i}", hint=f"H{i}")) for i in range(8)]
    assert [task.result().output for task in tasks] == [f"R{i}: H{i}" for i in range(8)]


FRONT = Agent(FunctionModel(echo), instructions="Route.")
BACK = Agent(FunctionModel(echo), instructions="Check.")


async def test_a_function_that_runs_an_agent_had_no_parameters() -> None:
    """A function that only calls an agent is trained by the agent's texts; candidates are kept apart."""

    async def ask(x: str) -> str:
        return str((await FRONT.run(x)).output)

    agent = trainable(ask)
    assert names(agent) == ["instructions"]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(rollout(agent, instructions=f"R{i}")) for i in range(8)]
    assert [task.result().output for task in tasks] == [f"R{i}" for i in range(8)]
    with agent.applied({"instructions": "Applied."}) as program:
        assert await program("hello") == "Applied."
    assert await ask("hello") == "Route."


async def test_a_function_that_runs_two_agents_is_trained_by_the_texts_of_both() -> None:
    """Names that both have begin with the function's variable; a parameter of the function's own comes first."""

    def ask(x: str) -> str:
        return f"{FRONT.run_sync(x).output} {BACK.run_sync(x).output}"

    async def own(x: str, *, hint: str = "") -> str:
        return str((await FRONT.run(hint + x)).output)

    assert names(trainable(ask)) == ["FRONT.instructions", "BACK.instructions"]
    assert names(trainable(own)) == ["hint"]
    found = await rollout(trainable(ask), FRONT__instructions="A.", BACK__instructions="B.")
    assert found.output == "A. B."
