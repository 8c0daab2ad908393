"""LangChain and LangGraph: which texts are trained in agents, graphs and chains, isolation, transcripts."""

from __future__ import annotations

import asyncio
import copy
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

pytest.importorskip("langchain.agents", reason="runs in the environment langchain of tests/environments.py")

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from aggregator import ParameterNode, as_agent, trainable
from aggregator.errors import ConfigError
from aggregator.executors.work import AgentWork
from aggregator.llm.observed import Observed
from aggregator.records import Rollout, RolloutTask, Sample
from aggregator.simulation import SimulatedModel


class Scripted(BaseChatModel):
    """Answers with the result of a function of (messages, tools)."""

    answer: Any
    tools: Any = ()

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **_: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self.answer(messages, self.tools))])

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self.model_copy(update={"tools": tools})


def echo(messages: Any, tools: Any) -> AIMessage:
    """Answer with everything that the model got, except the user's message."""
    told = [one.text for one in messages if isinstance(one, SystemMessage)]
    return AIMessage(" | ".join([*told, *(f"{one.name}: {one.description}" for one in tools)]))


def uses_tool(messages: Any, tools: Any) -> AIMessage:
    """Call the first tool, then answer with its result."""
    if isinstance(messages[-1], ToolMessage):
        return AIMessage(f"{messages[0].text}: {messages[-1].text}")
    return AIMessage("", tool_calls=[{"name": tools[0].name, "args": {"customer": "Ada"}, "id": "call-1"}])


@tool
def shared(customer: str) -> str:
    """Return what a customer bought."""
    return f"{customer} bought a lamp"


def support(answer: Callable[..., Any] = echo, **options: Any) -> Any:
    @tool
    def history(customer: str) -> str:
        """Return what a customer bought."""
        return f"{customer} bought a lamp"

    return create_agent(Scripted(answer=answer), tools=[history], system_prompt="Be brief.", **options)


async def rollout(agent: Any, x: Any = "hello", guide: Any = None, **values: str) -> Rollout:
    given = {name.replace("__", "."): value for name, value in values.items()}
    task = RolloutTask(sample=Sample(0, x), values=given, lineage=("test",), role="agent", capture=True)
    return await AgentWork(as_agent(agent), guide)(task)


def names(agent: Any) -> list[str]:
    return [parameter.name for parameter in agent.parameters()]


def test_an_agents_system_prompt_and_descriptions_of_tools_are_parameters() -> None:
    assert names(trainable(support())) == ["system_prompt", "history.description"]


async def test_an_agents_texts_reach_the_model_under_the_values_of_the_rollout() -> None:
    host = support()
    found = await rollout(host, system_prompt="A.", history__description="B.")
    assert found.output == "A. | history: B."
    assert (
        host.invoke({"messages": ["hello"]})["messages"][-1].text
        == "Be brief. | history: Return what a customer bought."
    )


async def test_an_agents_own_middleware_still_runs_sync_and_async() -> None:
    @wrap_model_call
    def shout(request: Any, handler: Any) -> Any:
        return handler(request.override(system_message=SystemMessage(request.system_message.text.upper())))

    @wrap_model_call
    async def ashout(request: Any, handler: Any) -> Any:
        return await handler(request.override(system_message=SystemMessage(request.system_message.text.upper())))

    assert (await rollout(support(middleware=[ashout]), system_prompt="quiet")).output.startswith("QUIET")
    host = support(middleware=[shout])
    with trainable(host).applied({"system_prompt": "quiet"}):
        assert host.invoke({"messages": ["hello"]})["messages"][-1].text.startswith("QUIET")


async def test_accepted_values_are_in_the_hosts_agent() -> None:
    host = support()
    trainable(host).apply({"system_prompt": "Trained.", "history.description": "Find."})
    assert (await host.ainvoke({"messages": ["hello"]}))["messages"][-1].text == "Trained. | history: Find."


async def test_concurrent_candidates_share_one_agent_and_keep_their_texts() -> None:
    agent = trainable(support())
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(rollout(agent, system_prompt=f"S{i}.", history__description=f"D{i}.")) for i in range(16)
        ]
    assert [task.result().output for task in tasks] == [f"S{i}. | history: D{i}." for i in range(16)]


async def test_an_agent_is_adapted_twice_with_the_same_parameters() -> None:
    host = support()
    trainable(host).apply({"system_prompt": "Once."})
    assert trainable(host).parameters()[0].data == "Once."
    assert (await rollout(host, system_prompt="Twice.")).output.startswith("Twice.")


class State(TypedDict):
    ticket: str
    team: str
    log: Annotated[list[str], operator.add]


rules = ParameterNode("If no rule applies, answer sales.", name="rules")
prompt = ChatPromptTemplate.from_messages([("system", "Route {{it}}."), ("human", "{ticket}")])
inner = create_agent(Scripted(answer=echo), tools=[], system_prompt="Inner.")


def graph(**options: Any) -> Any:
    def route(state: State) -> dict[str, Any]:
        answer = (prompt | Scripted(answer=echo)).invoke({"ticket": state["ticket"]})
        return {"team": f"{rules.data} {answer.text}", "log": ["route"]}

    async def ask(state: State) -> dict[str, Any]:
        found = await inner.ainvoke({"messages": [state["ticket"]]})
        return {"team": f"{state['team']} {found['messages'][-1].text}", "log": ["ask"]}

    made = StateGraph(State).add_node("route", route).add_node("ask", ask)
    return made.add_edge(START, "route").add_edge("route", "ask").add_edge("ask", END).compile(**options)


def test_texts_that_functions_of_a_graph_read_are_parameters() -> None:
    agent = trainable(graph(), input="ticket", output="team")
    assert set(names(agent)) == {"rules", "prompt.system", "inner.system_prompt"}


async def test_a_graphs_texts_apply_in_sync_and_async_nodes_of_concurrent_candidates() -> None:
    agent = trainable(graph(), input="ticket", output="team")
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(rollout(agent, rules=f"R{i}", prompt__system=f"P{{{i}}}", inner__system_prompt=f"I{i}"))
            for i in range(8)
        ]
    assert [task.result().output for task in tasks] == [f"R{i} P{{{i}}} I{i}" for i in range(8)]
    assert (await rollout(agent)).output == "If no rule applies, answer sales. Route {it}. Inner."


async def test_texts_that_methods_and_containers_hold_are_parameters() -> None:
    class Router:
        def __init__(self) -> None:
            self.prompts = {"route": ChatPromptTemplate.from_messages([("system", "Route."), ("human", "{ticket}")])}
            self.tone = ParameterNode("kind", name="tone")

        def route(self, state: State) -> dict[str, Any]:
            answer = (self.prompts["route"] | Scripted(answer=echo)).invoke({"ticket": state["ticket"]})
            return {"team": f"{answer.text} {self.tone.data}"}

        def __call__(self, state: State) -> dict[str, Any]:
            return {"team": f"{state['team']}!"}

    made = StateGraph(State).add_node("route", Router().route).add_node("end", Router())
    agent = trainable(made.add_edge(START, "route").add_edge("route", "end").compile(), input="ticket", output="team")
    assert names(agent)[:2] == ["prompts.route.system", "tone"]
    assert (await rollout(agent, prompts__route__system="Go.", tone="rude")).output == "Go. rude!"


async def test_parameters_that_no_function_names_can_be_given() -> None:
    class Store:
        node = ParameterNode("Hidden.", name="hidden")

    made = StateGraph(State).add_node("x", lambda state: {"team": Store.node.data}).add_edge(START, "x")
    agent = trainable(made.compile(), [Store.node], input="ticket", output="team")
    assert names(agent) == ["hidden"]
    assert (await rollout(agent, hidden="Seen.")).output == "Seen."


async def test_nodes_of_a_graph_are_in_the_transcript_in_their_order() -> None:
    found = await rollout(trainable(graph(), input="ticket", output="team"))
    lines = [line for line in found.transcript.splitlines() if line.startswith(("node ", "LLM call"))]
    assert lines == ["node route", "LLM call", "node ask", "node model", "LLM call"]


async def test_a_graph_with_memory_runs_each_rollout_as_its_own_conversation() -> None:
    agent = trainable(support(checkpointer=InMemorySaver()))
    first, second = [await rollout(agent, "hello") for _ in range(2)]
    assert first.output == second.output == "Be brief. | history: Return what a customer bought."
    assert second.transcript.count("user: hello") == 1


def test_a_subgraph_is_trained_under_the_name_of_its_node() -> None:
    made = StateGraph(State).add_node("front", support()).add_edge(START, "front").compile()
    assert names(trainable(made, input="ticket")) == ["front.system_prompt", "front.history.description"]


def test_an_agent_that_a_tool_calls_is_trained() -> None:
    refunds = create_agent(Scripted(answer=echo), tools=[shared], system_prompt="Pay.")

    @tool
    def ask_refunds(question: str) -> str:
        """Ask about refunds."""
        return str(refunds.invoke({"messages": [question]})["messages"][-1].text)

    host = create_agent(Scripted(answer=echo), tools=[ask_refunds], system_prompt="Route.")
    assert names(trainable(host)) == [
        "system_prompt",
        "ask_refunds.description",
        "refunds.system_prompt",
        "refunds.shared.description",
    ]


async def test_a_chains_templates_are_trained_and_its_placeholders_kept() -> None:
    template = ChatPromptTemplate.from_messages([("system", "You know {subject}."), ("human", "{question}")])
    chain = template | Scripted(answer=echo) | RunnableLambda(lambda message: message.text)
    agent = trainable(chain)
    assert names(agent) == ["system"]
    question = {"subject": "lamps", "question": "why?"}
    assert (await rollout(agent, question, system="Only {subject}!")).output == "Only lamps!"
    with pytest.raises(ValueError, match="variables subject"):
        agent.apply({"system": "Only lamps!"})
    agent.apply({"system": "All about {subject}."})
    assert chain.invoke(question) == "All about lamps."


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_of_an_adapted_template_formats_its_own_text(copied: Callable[[Any], Any]) -> None:
    part = PromptTemplate.from_template("Route {x}.")
    agent = trainable(part)
    other = copied(part)
    agent.apply({"prompt": "Trained {x}."})
    assert other.format(x="it") == "Route it."
    trainable(other).apply({"prompt": "Other {x}."})
    assert (part.format(x="it"), other.format(x="it")) == ("Trained it.", "Other it.")


async def test_a_single_template_is_trained() -> None:
    chain = PromptTemplate.from_template("Answer briefly: {x}") | RunnableLambda(lambda value: value.text)
    agent = trainable(chain)
    assert names(agent) == ["prompt"]
    assert (await rollout(agent, "why?", prompt="Answer at length: {x}")).output == "Answer at length: why?"


def test_a_graph_that_is_not_compiled_and_one_without_a_text_are_refused() -> None:
    made = StateGraph(State).add_node("x", lambda state: {}).add_edge(START, "x")
    with pytest.raises(ConfigError, match=r"Expected a compiled graph, got StateGraph; call compile\(\) first"):
        trainable(made)
    with pytest.raises(ConfigError, match="with a text that can be trained"):
        trainable(made.compile())


async def test_unknown_keys_of_a_state_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"output= a key of the graph's state \(ticket, team, log\), got 'teem'"):
        trainable(graph(), input="ticket", output="teem")
    chain = PromptTemplate.from_template("Answer briefly: {x}") | RunnableLambda(lambda value: {"text": value.text})
    assert (await rollout(trainable(chain, output="text"), "why?")).output == "Answer briefly: why?"
    with pytest.raises(ConfigError, match="Expected a result with the key 'txt', got the keys text"):
        await rollout(trainable(chain, output="txt"), "why?")


async def test_tools_and_calls_of_models_are_in_the_transcript() -> None:
    found = await rollout(support(uses_tool))
    assert found.output == "Be brief.: Ada bought a lamp"
    lines = [line.strip() for line in found.transcript.splitlines()]
    assert [line for line in lines if line.startswith(("tool history", "LLM call"))] == [
        "LLM call",
        "tool history",
        "LLM call",
    ]
    assert 'reply: tool call: history({"customer":"Ada"})' in lines


async def test_two_runs_with_one_input_have_one_transcript() -> None:
    """A transcript is part of a prompt: an id that differs in each run would make the replay miss."""
    assert (await rollout(support(uses_tool))).transcript == (await rollout(support(uses_tool))).transcript


async def test_an_observed_call_is_in_the_transcript_once() -> None:
    async with SimulatedModel() as server:
        model: Any = ChatOpenAI(model="gpt-4o-mini", base_url=server.base_url, api_key="none")
        host = create_agent(model, tools=[], system_prompt="If no rule applies, answer sales.")
        with Observed("all").watching():
            found = await rollout(host)
        await model.root_async_client.close()
    assert found.output == "sales"
    assert found.transcript.count("LLM call") == 1


async def test_saved_values_apply_inside_applied_only(tmp_path: Path) -> None:
    host = support()
    agent = trainable(host)
    agent.apply({"system_prompt": "Trained."})
    agent.save(tmp_path / "support.json")
    agent.apply({"system_prompt": "Plain."})
    with agent.applied(tmp_path / "support.json") as program:
        assert program.invoke({"messages": ["hello"]})["messages"][-1].text.startswith("Trained.")
    assert host.invoke({"messages": ["hello"]})["messages"][-1].text.startswith("Plain.")
