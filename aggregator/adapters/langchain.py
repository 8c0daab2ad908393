"""LangChain and LangGraph: agents of `create_agent`, compiled graphs, and chains with prompt templates.

Trained are system prompts and descriptions of tools of agents, the texts of prompt templates, and the ParameterNodes
that functions of a graph read; in subgraphs and in agents that tools call too. All of them are read when a graph or
chain runs, so that concurrent candidates share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import isawaitable
from typing import Any
from uuid import uuid4

from langchain_core.messages import BaseMessage
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable

from aggregator.adapters.frameworks import FrameworkAgent, require_version
from aggregator.adapters.function import objects_read_by
from aggregator.adapters.langchain_steps import Steps
from aggregator.adapters.langchain_texts import agent_texts, template_texts
from aggregator.agents.modules import walk
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import RolloutTask

Named = dict[str, ParameterNode[Any]]


def adapt(
    thing: Any,
    nodes: Sequence[Any] = (),
    *,
    input: str | None = None,  # noqa: A002 - the word of its users
    output: str | None = None,
    config: Any = None,
) -> LangChainAgent | None:
    """Return an agent, a compiled graph or a chain of LangChain's as one of ours; None for another object.

    `nodes` are ParameterNodes, or objects that hold some, which no function of the graph names. An input is placed
    under the key `input` of the state; without one, a text is a user's message for an agent, and the input of a chain.
    `output` is the key of the result; without one, it is the structured response or the text of the last message.
    `config` is that of each run, or a function of the input that returns it.

    Raises ConfigError for a graph that is not compiled, and for one without a text.
    """
    if hasattr(thing, "compile") and hasattr(thing, "add_node"):
        raise ConfigError(f"Expected a compiled graph, got {type(thing).__name__}; call compile() first")
    if not isinstance(thing, Runnable):
        return None
    return LangChainAgent(thing, nodes, input=input, output=output, config=config)


class LangChainAgent(FrameworkAgent):
    """A graph or chain of LangChain's. Parameters of subgraphs and of what functions read begin with their names."""

    def __init__(
        self,
        program: Any,
        nodes: Sequence[Any] = (),
        *,
        input: str | None = None,  # noqa: A002 - the word of its users
        output: str | None = None,
        config: Any = None,
    ) -> None:
        require_version("langchain-core", "1.0", "2")
        self.options: dict[str, Any] = {"nodes": nodes, "input": input, "output": output, "config": config}
        for name in ("input", "output"):
            channels, key = getattr(program, "channels", None), self.options[name]
            if channels is not None and key is not None and key not in channels:
                known = ", ".join(one for one in channels if ":" not in one and not one.startswith("__"))
                raise ConfigError(f"Expected {name}= a key of the graph's state ({known}), got {key!r}")
        found: Named = {}
        for name, node in walk(list(nodes), "nodes", set()):
            _add(found, name, node)
        _collect(program, "", found, set())
        super().__init__(program, found.values())

    def like(self, program: Any) -> LangChainAgent:
        """Return an agent with this one's options around another program."""
        return LangChainAgent(program, **self.options)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the output of one run; nodes, tools and calls of models are shown in the transcript."""
        x, config = task.sample.x, self.options["config"]
        config = config(x) if callable(config) else config
        given: dict[str, Any] = {**((await config if isawaitable(config) else config) or {})}
        if getattr(self.program, "checkpointer", None):  # each rollout is a conversation by itself
            given["configurable"] = {"thread_id": uuid4().hex, **given.get("configurable", {})}
        callbacks = given.get("callbacks") or []
        given["callbacks"] = [*(callbacks if isinstance(callbacks, list) else [callbacks]), Steps()]
        result = await self.program.ainvoke(self._input_of(x), config=given)
        return Ran(output=_output_of(result, self.options["output"]))

    def _input_of(self, x: Any) -> Any:
        if self.options["input"] is not None:
            return {self.options["input"]: x}
        if isinstance(x, str) and "messages" in (getattr(self.program, "channels", None) or {}):
            return {"messages": [{"role": "user", "content": x}]}
        return x


def _output_of(result: Any, key: str | None) -> Any:
    if key is not None:
        if not isinstance(result, Mapping) or key not in result:
            known = f"the keys {', '.join(map(str, result))}" if isinstance(result, Mapping) else type(result).__name__
            raise ConfigError(f"Expected a result with the key {key!r}, got {known} - at output=")
        result = result[key]
    elif isinstance(result, Mapping) and result.get("structured_response") is not None:
        return result["structured_response"]
    elif isinstance(result, Mapping) and result.get("messages"):
        result = result["messages"][-1]
    return str(result.text) if isinstance(result, BaseMessage) else result


def _collect(thing: Any, prefix: str, found: Named, seen: set[int]) -> None:
    """Add the parameters of a graph, a chain, a prompt, or of what their functions can name."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, ParameterNode):
        _add(found, prefix.removesuffix("."), thing)
        return
    is_prompt = isinstance(thing, BasePromptTemplate)
    for parameter in template_texts(thing, prefix) if is_prompt else agent_texts(thing, prefix):
        _add(found, parameter.name, parameter)
    for name, part in _parts_of(thing):
        _collect(part, f"{prefix}{name}", found, seen)
    for function in _functions_of(thing):
        for name, one in objects_read_by(function, (ParameterNode, Runnable)):
            shown = one.name if isinstance(one, ParameterNode) and one.named else name
            _collect(one, f"{shown}.", found, seen)


def _parts_of(thing: Any) -> list[tuple[str, Any]]:
    """Return (prefix, part) of the nodes of a graph, or of the steps of a chain."""
    if isinstance(nodes := getattr(thing, "nodes", None), Mapping):
        return [(f"{name}.", node.bound) for name, node in nodes.items() if name != "__start__"]
    return [("", one.data) for one in thing.get_graph().nodes.values() if isinstance(one.data, Runnable)]


def _functions_of(thing: Any) -> Iterator[Any]:
    """Yield the functions of a node, of a lambda, and of the tools of a node of tools."""
    yield from (one for one in (getattr(thing, "func", None), getattr(thing, "afunc", None)) if callable(one))
    for tool in (getattr(thing, "tools_by_name", None) or {}).values():
        yield from (one for one in (getattr(tool, "func", None), getattr(tool, "coroutine", None)) if callable(one))


def _add(found: Named, name: str, parameter: ParameterNode[Any]) -> None:
    """Add a parameter under its name, or with a number if another has it."""
    if any(parameter is known for known in found.values()):
        return
    name = parameter.name if parameter.named else name
    number = 2
    while (unique := name if number == 2 and name not in found else f"{name}_{number}") in found:
        number += 1
    parameter.name = unique
    found[unique] = parameter
