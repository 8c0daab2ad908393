"""CrewAI's crews: which texts are trained, how concurrent candidates are kept apart, and how an input is used."""

from __future__ import annotations

import asyncio
import os
import warnings
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("crewai") is None:
    pytest.skip("runs in the environment crewai of tests/environments.py", allow_module_level=True)
os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false", "OTEL_SDK_DISABLED": "true"}

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # of a submodule of CrewAI's that replaces itself
    from crewai import Agent, Crew, Task
    from crewai.llms.base_llm import BaseLLM

from aggregator import as_agent, trainable
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.records import Rollout, RolloutTask, Sample

pytestmark = pytest.mark.filterwarnings("ignore")


class Echo(BaseLLM):
    """Answers with its texts."""

    def call(self, messages: Any, *_: Any, **__: Any) -> str:
        given = messages if isinstance(messages, str) else " | ".join(str(one["content"]) for one in messages)
        return f"Thought: I know.\nFinal Answer: {given}"

    async def acall(self, messages: Any, *_: Any, **__: Any) -> str:
        await asyncio.sleep(0)
        return self.call(messages)

    def supports_function_calling(self) -> bool:
        return False


def crew(**options: Any) -> Crew:
    router = Agent(role="Ticket Router", goal="Route well.", backstory="You know {company}.", llm=Echo(model="echo"))
    route = Task(description="Route: {ticket}", expected_output="a team", agent=router, **options)
    return Crew(agents=[router], tasks=[route])


async def rollout(agent: Any, x: Any, **values: str) -> Rollout:
    given = {name.replace("__", "."): value for name, value in values.items()}
    task = RolloutTask(sample=Sample(0, x), values=given, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), None)(task)


def test_texts_of_agents_and_tasks_are_parameters() -> None:
    assert [parameter.name for parameter in trainable(crew(name="route")).parameters()] == [
        "ticket_router.role",
        "ticket_router.goal",
        "ticket_router.backstory",
        "route.description",
        "route.expected_output",
    ]
    assert "task_1.description" in [parameter.name for parameter in trainable(crew()).parameters()]


async def test_concurrent_candidates_run_on_copies_of_the_crew() -> None:
    host = crew()
    agent = trainable(host)
    x = {"ticket": "late", "company": "Lamps"}
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(rollout(agent, x, ticket_router__goal=f"G{i}!", task_1__description=f"D{i}: {{ticket}}"))
            for i in range(6)
        ]
    for i, task in enumerate(tasks):
        output = task.result().output
        assert f"G{i}!" in output
        assert f"D{i}: late" in output
        assert "You know Lamps." in output
    assert (host.agents[0].goal, host.tasks[0].description) == ("Route well.", "Route: {ticket}")


async def test_an_input_that_is_not_a_mapping_fills_the_placeholders() -> None:
    assert "Route: my lamp" in (await rollout(trainable(crew()), "my lamp")).output


async def test_accepted_values_are_in_a_crew_that_has_run() -> None:
    """CrewAI keeps the text with its placeholders separately once a crew has run; that text is trained."""
    host = crew()
    await host.akickoff(inputs={"ticket": "first", "company": "Lamps"})
    agent = trainable(host)
    values = {parameter.name: parameter.data for parameter in agent.parameters()}
    assert values["task_1.description"] == "Route: {ticket}"
    agent.apply({"task_1.description": "Send on: {ticket}"})
    found = await host.akickoff(inputs={"ticket": "second", "company": "Lamps"})
    assert "Send on: second" in found.raw


async def test_a_transcript_shows_tasks_and_calls_of_the_model() -> None:
    found = await rollout(trainable(crew()), "my lamp")
    assert "Ticket Router" in found.transcript
    assert "Route: my lamp" in found.transcript
    assert "LLM call" in found.transcript


def test_an_agent_of_a_crew_is_refused_with_the_remedy() -> None:
    """The error listed an agent of CrewAI among the accepted ones."""
    with pytest.raises(ConfigError, match=r"Expected a Crew, got a CrewAI Agent; give Crew"):
        trainable(crew().agents[0])


def test_two_agents_with_one_role_are_refused() -> None:
    one, other = (Agent(role=role, goal="G", backstory="B", llm=Echo(model="echo")) for role in ("A b", "a B"))
    task = Task(description="D", expected_output="E", agent=one)
    with pytest.raises(ConfigError, match="got 'a B' twice"):
        trainable(Crew(agents=[one, other], tasks=[task]))
