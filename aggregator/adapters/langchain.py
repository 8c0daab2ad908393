"""LangChain and LangGraph: agents of `create_agent`, compiled graphs, and chains with prompt templates.

Trained are system prompts and descriptions of tools of agents, the texts of prompt templates, and the ParameterNodes
that functions of a graph read; also in subgraphs and in agents that tools call. All of them are read when a graph or
chain runs, so that concurrent candidates share it.

A prompt template formats the text of the current context. An agent of `create_agent` gets one more layer around its
model calls, like a middleware, which sets the system prompt and the descriptions of tools. A transcript shows nodes,
tools, and model calls that no client observer has seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import isawaitable
from types import CellType
from typing import Any
from uuid import UUID, uuid4

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, SystemMessage, convert_to_openai_messages
from langchain_core.prompts import BasePromptTemplate, PromptTemplate
from langchain_core.prompts.string import get_template_variables
from langchain_core.runnables import Runnable
from msgspec import Struct

from aggregator.adapters.frameworks import Calls, FrameworkAgent, HostParameter, require_version
from aggregator.adapters.function import objects_read_by
from aggregator.agents.modules import walk
from aggregator.agents.parameters import ParameterNode
from aggregator.agents.transcripts import LLMCall, Span, current_transcript
from aggregator.errors import ConfigError
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import Choice, Completion, Message, RolloutTask, ToolCall, Usage
from aggregator.text import as_text

# ---- texts as parameters

_MODEL = "model"
"""The node of an agent of `create_agent` that calls its model."""


class Answered(Struct):
    """What a layer around a model call returns to LangChain."""

    model_response: Any
    commands: list[Any] = []


class AgentTexts:
    """The system prompt and the tools of one agent of `create_agent`, as `create_agent` holds them."""

    def __init__(self, cells: dict[str, CellType], prefix: str) -> None:
        message, tools = cells["system_message"], cells["default_tools"].cell_contents
        self.prompt: HostParameter | None = None
        if isinstance(getattr(message.cell_contents, "content", None), str):
            self.prompt = HostParameter(
                lambda: message.cell_contents.content,
                lambda text: setattr(message, "cell_contents", SystemMessage(content=text)),
                name=f"{prefix}system_prompt",
                description="system prompt of the agent",
            )
        self.descriptions = {
            tool.name: HostParameter(
                partial(getattr, tool, "description"),
                partial(setattr, tool, "description"),
                name=f"{prefix}{tool.name}.description",
                description=f"description of the tool {tool.name} that the model reads",
            )
            for tool in tools
            if not isinstance(tool, dict) and tool.description
        }

    def parameters(self) -> list[ParameterNode[Any]]:
        """Return the system prompt, then the descriptions of the tools."""
        return [*([self.prompt] if self.prompt else []), *self.descriptions.values()]

    def place(self, request: Any) -> Any:
        """Return a request of an agent with the texts of the current context."""
        tools = [
            tool.model_copy(update={"description": self.descriptions[tool.name].data})
            if getattr(tool, "name", None) in self.descriptions
            else tool
            for tool in request.tools
        ]
        prompt = {} if self.prompt is None else {"system_message": SystemMessage(content=self.prompt.data)}
        return request.override(tools=tools, **prompt)


def agent_texts(graph: Any, prefix: str) -> list[ParameterNode[Any]]:
    """Return the parameters of an agent of `create_agent`, or none for another graph.

    Raises ConfigError for a LangChain version with another structure of agents.
    """
    nodes = getattr(graph, "nodes", None)
    node = getattr(nodes.get(_MODEL), "bound", None) if isinstance(nodes, Mapping) else None
    functions = [one for one in (getattr(node, "func", None), getattr(node, "afunc", None)) if one is not None]
    if not functions or functions[0].__module__ != "langchain.agents.factory":
        return []
    require_version("langchain", "1.3", "2")
    texts: AgentTexts | None = None
    for function in functions:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        layer = next((name for name in cells if name.endswith("wrap_model_call_handler")), None)
        if layer is None or not {"system_message", "default_tools"} <= set(cells):
            raise ConfigError(
                "Expected an agent of LangChain's create_agent as its versions up to 1.5 make it, got another; read "
                "the prompt from a ParameterNode in a middleware of yours"
            )
        inner = cells[layer].cell_contents
        if (known := getattr(inner, "texts", None)) is not None:
            return list(known.parameters())
        texts = texts or AgentTexts(cells, prefix)
        cells[layer].cell_contents = _layer(texts, inner, is_async=layer.startswith("a"))
    return texts.parameters() if texts else []


def _layer(texts: AgentTexts, inner: Any, *, is_async: bool) -> Any:
    """Return a layer that sets the texts, then runs the agent's middleware."""

    def call(request: Any, execute: Any) -> Any:
        placed = texts.place(request)
        return Answered(model_response=execute(placed)) if inner is None else inner(placed, execute)

    async def acall(request: Any, execute: Any) -> Any:
        placed = texts.place(request)
        return Answered(model_response=await execute(placed)) if inner is None else await inner(placed, execute)

    made: Any = acall if is_async else call
    made.texts = texts
    return made


def template_texts(prompt: Any, prefix: str) -> Iterator[ParameterNode[Any]]:
    """Yield the parameters of a prompt: its texts, except those that only pass a variable on.

    A template without variables is shown unescaped, so that new text may hold any braces.
    """
    for message in getattr(prompt, "messages", [prompt]):
        held = getattr(message, "prompt", message)
        for part in held if isinstance(held, list) else [held]:
            if not isinstance(part, PromptTemplate):
                continue
            kind = type(message).__name__.removesuffix("MessagePromptTemplate").lower()
            name = f"{prefix}{'prompt' if message is prompt else kind}"
            if parameter := _template(part, name):
                yield parameter


def _template(part: PromptTemplate, name: str) -> ParameterNode[Any] | None:
    """Return the parameter of a template, which now formats the text of the current context.

    A copy of the template formats its own text.
    """
    kind: Any = type(part)
    if hasattr(kind, "aggregator_parameter"):
        made: ParameterNode[Any]
        owner, made = kind.aggregator_parameter()
        if owner is part:
            return made
        kind = kind.__base__
    form = part.template_format
    if not re.sub(r"\{+[^{}]*\}+", "", part.template).strip():
        return None
    variables = set(get_template_variables(part.template, form))
    is_literal = not variables and form == "f-string"

    def read() -> str:
        return part.template.format() if is_literal else str(part.template)

    def template_of(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}") if is_literal else text

    def fits(text: str) -> bool:
        return set(get_template_variables(template_of(text), form)) == variables

    fits.__doc__ = f"the variables {', '.join(sorted(variables)) or '(none)'} in the form of a {form} template"
    parameter = HostParameter(
        read,
        lambda text: setattr(part, "template", template_of(text)),
        name=name,
        description="text of a prompt",
        constraint=None if is_literal else fits,
    )

    def format_text(self: PromptTemplate, **values: Any) -> str:
        if self is not part:
            return str(kind.format(self, **values))
        now = kind(template=template_of(parameter.data), template_format=form, partial_variables=self.partial_variables)
        return str(now.format(**values))

    def reduce(self: PromptTemplate) -> tuple[Any, ...]:
        return _restore, (kind, self.__getstate__())

    body = {
        "format": format_text,
        "aggregator_parameter": staticmethod(lambda: (part, parameter)),
        "__reduce__": reduce,
    }
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    part.__class__ = type(kind.__name__, (kind,), {**body, **names})
    return parameter


def _restore(kind: Any, state: Any) -> Any:
    """Return a pickled template, which formats its own text."""
    made = kind.__new__(kind)
    made.__setstate__(state)
    return made


# ---- a run as a transcript


class Steps(BaseCallbackHandler):
    """The callbacks of one run, which write to the transcript that is current at construction."""

    run_inline = True
    raise_error = True

    def __init__(self) -> None:
        transcript = current_transcript()
        self._root = None if transcript is None else transcript.root
        self._calls = Calls()
        self._asked: dict[UUID, LLMCall] = {}
        self._spans: dict[UUID, Span] = {}

    def _open(self, run: UUID, name: str, inputs: Any) -> None:
        if self._root is not None:
            self._spans[run] = span = Span(name, inputs=[("input", inputs)])
            self._root.add(span)

    def _end(self, run: UUID, outputs: Any) -> None:
        if (span := self._spans.pop(run, None)) is not None:
            span.finish(outputs)

    def _fail(self, run: UUID, error: BaseException) -> None:
        if (span := self._spans.pop(run, None)) is not None:
            span.fail(error)

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **named: Any) -> None:
        """Open the span of a graph's node; other chains are not shown."""
        node = (named.get("metadata") or {}).get("langgraph_node")
        if node is not None and named.get("name") == node:
            self._open(run_id, f"node {node}", _readable(inputs))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """Record the node's result."""
        self._end(run_id, _readable(outputs))

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Record the node's exception."""
        self._fail(run_id, error)

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **named: Any) -> None:
        """Open the span of a tool."""
        name = (serialized or {}).get("name") or named.get("name") or "?"
        self._open(run_id, f"tool {name}", named.get("inputs") or input_str)

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """Record the tool's result."""
        self._end(run_id, _readable(output))

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Record the tool's exception."""
        self._fail(run_id, error)

    def on_chat_model_start(
        self, serialized: Any, messages: Sequence[Sequence[BaseMessage]], *, run_id: UUID, **_: Any
    ) -> None:
        """Take the slot of a call."""
        self._asked[run_id] = self._calls.start(convert_to_openai_messages(list(messages[0])))

    def on_llm_start(self, serialized: Any, prompts: Sequence[str], *, run_id: UUID, **_: Any) -> None:
        """Take the slot of a call to a completion model."""
        self._asked[run_id] = self._calls.start([{"role": "user", "content": prompts[0]}])

    def on_llm_end(self, response: Any, *, run_id: UUID, **_: Any) -> None:
        """Record the answer."""
        self._calls.end(self._asked.pop(run_id), completion_of(response.generations[0][0]))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Record that the call failed."""
        self._asked.pop(run_id).fail(error)


def completion_of(generation: Any) -> Completion:
    """Return a generation as our record."""
    message = getattr(generation, "message", None)
    if not isinstance(message, AIMessage):
        return Completion(choices=(Choice(message=Message(content=generation.text)),))
    calls = tuple(
        ToolCall(id=call["id"] or "", name=call["name"], arguments=as_text(call["args"])) for call in message.tool_calls
    )
    counted = message.usage_metadata or {}
    usage = Usage(input_tokens=counted.get("input_tokens"), output_tokens=counted.get("output_tokens"))
    return Completion(
        choices=(Choice(message=Message(content=str(message.text) or None, tool_calls=calls)),), usage=usage
    )


def _readable(value: Any) -> Any:
    """Return messages as their texts, in any part of a state or a command, because their ids differ in each run."""
    if isinstance(value, BaseMessage):
        return f"{value.type}: {value.text}"
    if hasattr(value, "goto") and hasattr(value, "update"):  # LangGraph's Command
        return _readable({"update": value.update, **({"goto": value.goto} if value.goto else {})})
    if isinstance(value, dict):
        return {key: _readable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    return value


Named = dict[str, ParameterNode[Any]]


# ---- the agent


def adapt(
    thing: Any,
    nodes: Sequence[Any] = (),
    *,
    input: str | None = None,  # noqa: A002 - the word of its users
    output: str | None = None,
    config: Any = None,
) -> LangChainAgent | None:
    """Return a LangChain agent, compiled graph or chain as one of ours; None for another object.

    `nodes` are ParameterNodes, or objects with some, that no function of the graph names. An input is stored under the
    key `input` of the state; without one, a text is a user's message for an agent, and the input of a chain. `output`
    is the key of the result; without one, it is the structured response or the text of the last message. `config` is
    that of each run, or a function of the input that returns it.

    Raises ConfigError for a graph that is not compiled, and for one without a text.
    """
    if hasattr(thing, "compile") and hasattr(thing, "add_node"):
        raise ConfigError(f"Expected a compiled graph, got {type(thing).__name__}; call compile() first")
    if not isinstance(thing, Runnable):
        return None
    return LangChainAgent(thing, nodes, input=input, output=output, config=config)


class LangChainAgent(FrameworkAgent):
    """A LangChain graph or chain. Parameters of subgraphs and of functions' objects begin with their names."""

    def __init__(
        self,
        program: Any,
        nodes: Sequence[Any] = (),
        *,
        input: str | None = None,  # noqa: A002 - the word of its users
        output: str | None = None,
        config: Any = None,
    ) -> None:
        require_version("langchain-core", "1.4", "2")
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
        """Return an agent with the same options around another program."""
        return LangChainAgent(program, **self.options)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the output of one run; nodes, tools and model calls are shown in the transcript."""
        x, config = task.sample.x, self.options["config"]
        config = config(x) if callable(config) else config
        given: dict[str, Any] = {**((await config if isawaitable(config) else config) or {})}
        if getattr(self.program, "checkpointer", None):  # each rollout is its own conversation
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
    """Add the parameters of a graph, a chain, a prompt, or of objects that their functions can name."""
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
    """Yield the functions of a node, of a lambda, and of the tools of a tool node."""
    yield from (one for one in (getattr(thing, "func", None), getattr(thing, "afunc", None)) if callable(one))
    for tool in (getattr(thing, "tools_by_name", None) or {}).values():
        yield from (one for one in (getattr(tool, "func", None), getattr(tool, "coroutine", None)) if callable(one))


def _add(found: Named, name: str, parameter: ParameterNode[Any]) -> None:
    """Add a parameter under its name, with a number if the name is taken."""
    if any(parameter is known for known in found.values()):
        return
    name = parameter.name if parameter.named else name
    number = 2
    while (unique := name if number == 2 and name not in found else f"{name}_{number}") in found:
        number += 1
    parameter.name = unique
    found[unique] = parameter
