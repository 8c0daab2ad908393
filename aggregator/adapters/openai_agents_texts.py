"""The texts of agents, tools and handoffs of the OpenAI Agents SDK as parameters that the SDK reads where they are.

An adapted object becomes one of a subclass, in which a trained text is a property: it answers with the value of the
current context. Assigning to it works as before. A copy, however made, is a plain object of the SDK's class again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from inspect import isfunction
from typing import Any

from agents import Agent, FunctionTool, Handoff

from aggregator.adapters.frameworks import HostParameter
from aggregator.adapters.function import objects_read_by

_TEXTS = "_aggregator_texts"


def reach(agent: Agent[Any], reached: list[Agent[Any]]) -> None:
    """Add an agent, and those that its handoffs and tools lead to, each once."""
    if any(agent is known for known in reached):
        return
    reached.append(agent)
    targets = [one if isinstance(one, Agent) else one._agent_ref and one._agent_ref() for one in agent.handoffs]
    for tool in agent.tools:
        targets += [getattr(tool, "_agent_instance", None), *_agents_run_by(tool)]
    for target in targets:
        if isinstance(target, Agent):
            reach(target, reached)


def _agents_run_by(tool: Any) -> list[Agent[Any]]:
    """Return the agents that the user's function behind a tool can name, which it may run by itself."""
    invoked = getattr(getattr(tool, "on_invoke_tool", None), "_invoke_tool_impl", None)
    cells = getattr(invoked, "__closure__", None) or ()
    functions = [cell.cell_contents for cell in cells if isfunction(cell.cell_contents)]
    users = [one for one in functions if not one.__module__.startswith("agents.")]
    return [agent for one in users for _, agent in objects_read_by(one, Agent)]


def texts_of(agents: Sequence[Agent[Any]]) -> Iterator[HostParameter]:
    """Yield a parameter for each fixed text, the instructions first; a tool that agents share has one."""
    for agent in agents:
        yield from _text(agent, "instructions", f"{agent.name}.instructions", f"instructions of the agent {agent.name}")
    for agent in agents:
        about = f"when to hand a conversation over to the agent {agent.name}"
        yield from _text(agent, "handoff_description", f"{agent.name}.handoff_description", about)
    shared: dict[int, tuple[str, Any]] = {}
    for agent in agents:
        for tool in (*agent.tools, *agent.handoffs):
            if isinstance(tool, FunctionTool | Handoff):
                shared.setdefault(id(tool), (agent.name, tool))
    names = Counter(_name_of(tool) for _, tool in shared.values())
    for owner, tool in shared.values():
        name = _name_of(tool) if names[_name_of(tool)] == 1 else f"{owner}.{_name_of(tool)}"
        attribute = "tool_description" if isinstance(tool, Handoff) else "description"
        yield from _text(tool, attribute, f"{name}.description", "description of a tool that the model reads")


def _name_of(tool: FunctionTool | Handoff[Any, Any]) -> str:
    return str(tool.tool_name if isinstance(tool, Handoff) else tool.name)


def _text(owner: Any, attribute: str, name: str, about: str) -> Iterator[HostParameter]:
    """Yield the parameter of an object's text, if it has one; from now on the object reads it there."""
    held = vars(owner)
    if not isinstance(held[attribute], str) or not held[attribute]:
        return
    texts = held.setdefault(_TEXTS, {})
    if attribute not in texts:
        kind: Any = type(owner)
        owner.__class__ = _reading(kind)
        read, write = partial(held.__getitem__, attribute), partial(held.__setitem__, attribute)
        texts[attribute] = HostParameter(read, write, name=name, description=about)
    yield texts[attribute]


class _Text:
    """An attribute that is the text of the current context; on an object without a parameter, what was assigned."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            return None
        parameter = vars(owner).get(_TEXTS, {}).get(self.name)
        return vars(owner)[self.name] if parameter is None else parameter.data

    def __set__(self, owner: Any, value: Any) -> None:
        vars(owner)[self.name] = value


@cache
def _reading(kind: Any) -> Any:
    """Return a subclass whose texts are those of the current context."""
    if any(isinstance(one, _Text) for one in vars(kind).values()):
        return kind
    names = ("instructions", "handoff_description", "description", "tool_description")
    texts = {name: _Text(name) for name in names if name in kind.__dataclass_fields__}

    def reduce(self: Any) -> tuple[Any, ...]:
        return _restore, (kind, {name: value for name, value in vars(self).items() if name != _TEXTS})

    shown = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**texts, **shown, "__reduce__": reduce})


def _restore(kind: Any, state: dict[str, Any]) -> Any:
    """Return a copy of an adapted object, which reads its own texts."""
    made = object.__new__(kind)
    vars(made).update(state)
    return made
