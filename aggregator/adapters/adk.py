"""Google ADK agents: the instructions of an agent, its sub-agents and agents used as tools are parameters.

Each rollout runs on a clone of the tree of agents, with the texts of its context, in its own session. Models, functions
and toolsets are shared with the host's agents, which have the accepted texts afterwards.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import isawaitable
from typing import Any

from google.adk.agents import BaseAgent, LlmAgent
from google.adk.runners import InMemoryRunner
from google.adk.tools.agent_tool import AgentTool
from google.genai import types

from aggregator.adapters.frameworks import Calls, FrameworkAgent, HostParameter, require_version
from aggregator.adapters.function import nodes_read_by
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.transcripts import recording
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.llm.models import as_completion
from aggregator.records import RolloutTask
from aggregator.text import as_text

TEXTS = {
    "instruction": "the instruction of the agent {}",
    "global_instruction": "the instruction of all agents",
    "static_instruction": "the fixed first part of the instruction of the agent {}",
    "description": "the description of the agent {}, by which other agents choose it",
}
"""The texts of an agent that its models read."""

_APP = "aggregator"
_USER = "user"


def adapt(thing: Any, *, state: Any = None) -> AdkAgent | None:
    """Return an ADK agent as one of ours; None for another object of the package.

    `state` is the initial state of each session, or a function of the input that returns it.
    """
    return AdkAgent(thing, state=state) if isinstance(thing, BaseAgent) else None


class AdkAgent(FrameworkAgent):
    """An ADK agent with all agents below it. A parameter's name begins with its agent's.

    Raises ConfigError for an unsupported version, agents without a fixed text, and two agents with one name.
    """

    isolation = "copy"

    def __init__(self, program: Any, *, state: Mapping[str, Any] | Callable[[Any], Any] | None = None) -> None:
        require_version("google-adk", "2", "3")
        self.state = state
        functions: list[Any] = []
        for agent in agents_of(program):
            functions += [getattr(agent, name, None) for name in ("instruction", "global_instruction")]
            functions += [getattr(tool, "func", tool) for tool in getattr(agent, "tools", ())]
        super().__init__(program, nodes_read_by(functions, parameters_of(program)))

    def like(self, program: Any) -> AdkAgent:
        """Return an agent with the same options around another program."""
        return AdkAgent(program, state=self.state)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield a clone of the tree of agents with the texts of this context."""
        yield copy_with(self.program, {name: one.data for name, one in self._parameters.items()})

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the text of the final response; an agent with an `output_schema` gives the object."""
        x = task.sample.x
        state = self.state(x) if callable(self.state) else self.state
        state = await state if isawaitable(state) else state
        with self.placed() as agent:
            runner = InMemoryRunner(agent=agent, app_name=_APP)
            session = await runner.session_service.create_session(app_name=_APP, user_id=_USER, state=dict(state or {}))
            account = _Account(agent, x)
            message = x
            if not isinstance(x, types.Content):
                message = types.Content(role="user", parts=[types.Part(text=as_text(x))])
            async for event in runner.run_async(user_id=_USER, session_id=session.id, new_message=message):
                account.show(event)
        return Ran(output=_output_of(agent, account.events))


def agents_of(root: Any) -> Iterator[Any]:
    """Yield an agent and those below it, sub-agents and agents of tools, each once."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        agent = waiting.pop(0)
        if id(agent) in seen:
            continue
        seen.add(id(agent))
        yield agent
        waiting += [*agent.sub_agents, *(tool.agent for tool in _agent_tools(agent))]


def _agent_tools(agent: Any) -> list[Any]:
    return [tool for tool in getattr(agent, "tools", ()) if isinstance(tool, AgentTool)]


def parameters_of(root: Any) -> list[ParameterNode[Any]]:
    """Return the fixed texts of a tree of agents as parameters; functions that return texts are unchanged.

    Raises ConfigError for two agents with one name.
    """
    agents = list(agents_of(root))
    names = [agent.name for agent in agents]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Expected agents of different names, got several named {', '.join(twice)}; rename them")
    found: list[ParameterNode[Any]] = []
    for agent in agents:
        for field, description in TEXTS.items():
            text = getattr(agent, field, None)
            is_read = field != "description" or agent is not root
            if is_read and isinstance(text, str) and text and isinstance(agent, LlmAgent):
                read, write = partial(getattr, agent, field), partial(setattr, agent, field)
                name = f"{agent.name}.{field}"
                found.append(HostParameter(read, write, name=name, description=description.format(agent.name)))
    return found


def copy_with(agent: Any, values: Mapping[str, Any], made: dict[int, Any] | None = None) -> Any:
    """Return a clone of a tree of agents with these texts by name; the agents themselves do not change."""
    made = {} if made is None else made
    if id(agent) in made:
        return made[id(agent)]
    update: dict[str, Any] = {
        field: values[f"{agent.name}.{field}"] for field in TEXTS if f"{agent.name}.{field}" in values
    }
    if _agent_tools(agent):
        update["tools"] = [
            _tool_with(tool, copy_with(tool.agent, values, made)) if isinstance(tool, AgentTool) else tool
            for tool in agent.tools
        ]
    update["sub_agents"] = [copy_with(one, values, made) for one in agent.sub_agents]
    clone = made[id(agent)] = agent.clone(update=update)
    return clone


def _tool_with(tool: Any, agent: Any) -> Any:
    clone = copy.copy(tool)
    clone.agent, clone.description = agent, agent.description
    return clone


def _text_of(event: Any) -> str:
    parts = event.content.parts if event.content and event.content.parts else ()
    return "".join(part.text for part in parts if part.text and not part.thought)


def _output_of(agent: Any, events: list[Any]) -> Any:
    final = [event for event in events if event.is_final_response()]
    text = next((found for event in reversed(final) if (found := _text_of(event))), "")
    failed = next((event for event in events if event.error_code), None)
    if failed is not None and not text:
        raise RuntimeError(f"{failed.error_code}: {failed.error_message}")
    if getattr(agent, "output_schema", None) is None:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Account:
    """Shows a run in the transcript, event by event: tools, handoffs (a tool, `transfer_to_agent`), calls of models.

    For a call the events have the author's instruction, the previous messages and the answer.
    """

    def __init__(self, root: Any, x: Any) -> None:
        self.events: list[Any] = []
        self._calls = Calls()
        self._instructions = {agent.name: getattr(agent, "instruction", "") for agent in agents_of(root)}
        self._before: list[dict[str, Any]] = [{"role": "user", "content": as_text(x)}]
        self._given: dict[Any, Any] = {}

    def show(self, event: Any) -> None:
        self.events.append(event)
        asked = event.get_function_calls()
        self._given |= {one.id: one.args for one in asked}
        answer = _text_of(event) or "\n".join(f"{one.name}({as_text(one.args)})" for one in asked)
        responses = event.get_function_responses()
        if answer and not event.partial and not responses:
            system = self._instructions.get(event.author, "")
            head = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
            self._calls.write([([*head, *self._before], as_completion(answer))])
            self._before.append({"role": "assistant", "content": answer})
        for one in responses:
            given = self._given.get(one.id) or {}
            with recording(one.name, f"tool of {event.author}", list(given.items())) as span:
                span.finish(one.response)
            self._before.append({"role": "tool", "content": f"{one.name}: {as_text(one.response)}"})
