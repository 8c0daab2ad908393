"""The texts of LangChain as parameters: prompt templates, and what `create_agent` keeps for itself.

A prompt template formats the text of the current context. An agent of `create_agent` gets one more layer around its
calls of the model, as its middleware are: it puts system prompt and descriptions of tools in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType
from typing import Any

from langchain_core.messages import SystemMessage
from langchain_core.prompts import PromptTemplate
from langchain_core.prompts.string import get_template_variables
from msgspec import Struct

from aggregator.adapters.frameworks import HostParameter, require_version
from aggregator.agents.parameters import ParameterNode
from aggregator.errors import ConfigError

_MODEL = "model"
"""The node of an agent of `create_agent` that asks its model."""


class Answered(Struct):
    """What a layer around a call of the model returns to LangChain."""

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
    """Return the parameters of an agent of `create_agent`; none for another graph.

    Raises ConfigError for a version of LangChain whose agents are made in another way.
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
    """Return a layer that puts texts in place, then does what the agent's middleware do."""

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
    """Yield the parameters of a prompt: its texts, but for those that only pass a variable on.

    A template without variables is shown without its escapes, so that new text may hold any braces.
    """
    for message in getattr(prompt, "messages", [prompt]):
        for part in _templates_of(message):
            kind = type(message).__name__.removesuffix("MessagePromptTemplate").lower()
            name = f"{prefix}{'prompt' if message is prompt else kind}"
            if parameter := _template(part, name):
                yield parameter


def _templates_of(message: Any) -> list[PromptTemplate]:
    held = getattr(message, "prompt", message)
    return [part for part in (held if isinstance(held, list) else [held]) if isinstance(part, PromptTemplate)]


def _template(part: PromptTemplate, name: str) -> ParameterNode[Any] | None:
    """Return the parameter of a template; from now on the template formats the text of the current context.

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
