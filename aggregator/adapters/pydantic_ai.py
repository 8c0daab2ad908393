"""pydantic-ai agents: instructions, system prompts and descriptions of tools are parameters, also of agents in tools.

Instructions are overridden by `agent.override`; system prompts and descriptions are read from the parameters when an
agent runs. All of this is local to a context, so that concurrent candidates share the agents.

Histories are shown as chats in OpenAI's shape, in transcripts and to our model inside their agents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from inspect import isawaitable
from typing import Any

from pydantic_ai import Agent, capture_run_messages
from pydantic_ai.agent import AbstractAgent, WrapperAgent
from pydantic_ai.messages import InstructionPart, ModelMessage, ModelRequest, ModelResponse
from pydantic_ai.tools import Tool, ToolDefinition
from pydantic_ai.toolsets import FunctionToolset

from aggregator.adapters.frameworks import Calls, FrameworkAgent, HostParameter, require_version
from aggregator.adapters.function import nodes_read_by, objects_read_by
from aggregator.agents.parameters import ParameterNode
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import Choice, Completion, Message, RolloutTask, ToolCall, Usage
from aggregator.text import as_text

# ---- histories as chats


def prompt_of(x: Any) -> Any:
    """Return an input as a user's prompt: a text or a list of user content unchanged, anything else as JSON."""
    return x if isinstance(x, str | list | tuple) else as_text(x)


def calls_of(messages: Sequence[ModelMessage]) -> Iterator[tuple[list[dict[str, Any]], Completion]]:
    """Yield the messages and the answer of each request in a history."""
    for i, response in enumerate(messages):
        if isinstance(response, ModelResponse):
            request = next((one for one in reversed(messages[:i]) if isinstance(one, ModelRequest)), None)
            yield chat_of(messages[:i], request.instructions if request else None), completion_of(response)


def completion_of(response: ModelResponse) -> Completion:
    """Return a response as our record."""
    calls = tuple(
        ToolCall(id=call.tool_call_id, name=call.tool_name, arguments=call.args_as_json_str())
        for call in response.tool_calls
    )
    usage = Usage(input_tokens=response.usage.input_tokens, output_tokens=response.usage.output_tokens)
    thoughts = "".join(part.content for part in response.parts if part.part_kind == "thinking")
    message = Message(content=response.text, reasoning=thoughts or None, tool_calls=calls)
    return Completion(choices=(Choice(message=message),), usage=usage, model=response.model_name or "")


def chat_of(messages: Sequence[ModelMessage], instructions: str | None) -> list[dict[str, Any]]:
    """Return a history as messages in OpenAI's shape, the instructions first.

    Content that is neither text nor an image is a part with its kind only.
    """
    chat: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    for message in messages:
        if isinstance(message, ModelResponse):
            calls = [
                {
                    "id": call.tool_call_id,
                    "type": "function",
                    "function": {"name": call.tool_name, "arguments": call.args_as_json_str()},
                }
                for call in message.tool_calls
            ]
            chat.append({"role": "assistant", "content": message.text, **({"tool_calls": calls} if calls else {})})
        else:
            chat.extend(_part(part) for part in message.parts)
    return chat


def _part(part: Any) -> dict[str, Any]:
    if hasattr(part, "model_response_str"):
        return {"role": "tool", "tool_call_id": part.tool_call_id, "content": part.model_response_str()}
    if part.part_kind == "system-prompt":
        return {"role": "system", "content": part.content}
    if hasattr(part, "model_response"):
        return {"role": "user", "content": part.model_response()}
    content = getattr(part, "content", "")
    return {"role": "user", "content": content if isinstance(content, str) else [_piece(one) for one in content]}


def _piece(piece: Any) -> dict[str, Any]:
    """Return one piece of a user's prompt: a text, an image, or the name of another kind."""
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    if piece.kind == "image-url":
        return {"type": "image_url", "image_url": {"url": piece.url}}
    if getattr(piece, "is_image", False):
        return {"type": "image_url", "image_url": {"url": piece.data_uri}}
    if isinstance(text := getattr(piece, "content", None), str):
        return {"type": "text", "text": text}
    return {"type": piece.kind}


Named = list[tuple[str, "Agent[Any, Any]"]]


# ---- the agent


def adapt(thing: Any, *, deps: Any = None, agents: Sequence[Any] = ()) -> PydanticAgent | None:
    """Return a pydantic-ai agent as one of ours; None for another object of the package.

    `deps` are each run's dependencies, or a function of the input that returns them. Agents that tools call are found
    by the variables that the tools' functions read; `agents` are further agents to train.
    """
    return PydanticAgent(thing, deps=deps, agents=agents) if isinstance(thing, AbstractAgent) else None


class PydanticAgent(FrameworkAgent):
    """A pydantic-ai agent. Parameters of other agents that it reaches begin with their names.

    Raises ConfigError for an unsupported version, an agent without a text, and two agents with one name.
    """

    def __init__(self, program: Any, *, deps: Any = None, agents: Sequence[Any] = ()) -> None:
        require_version("pydantic-ai-slim", "2.40", "3")
        self.deps = deps
        self.agents = agents
        reached: Named = [("", bare(program))]
        for name, agent in [("", program), *((str(one.name), one) for one in agents)]:
            _reach(bare(agent), name, reached)
        self._instructions = [(agent, _instructions_of(agent, prefix_of(name))) for name, agent in reached]
        parameters = [
            *(one for _, texts in self._instructions for one in texts.values()),
            *(one for name, agent in reached for one in _system_prompts_of(agent, prefix_of(name))),
            *(one for name, agent in reached for one in _descriptions_of(agent, prefix_of(name))),
        ]
        functions: list[Any] = []
        for _, agent in reached:
            functions += [sourced.instruction for sourced in agent._instructions]
            functions += [runner.function for runner in agent._system_prompt_functions]
            functions += [tool.function for tool in _tools_of(agent)]
        super().__init__(program, nodes_read_by(functions, parameters))

    def like(self, program: Any) -> PydanticAgent:
        """Return an agent with the same options around another program."""
        return PydanticAgent(program, deps=self.deps, agents=self.agents)

    @contextmanager
    def placed(self) -> Iterator[Any]:
        """Yield the host's agent with the instructions of this context."""
        with ExitStack() as stack:
            for agent, texts in self._instructions:
                if texts:
                    given = [
                        _with_text(sourced.instruction, texts[i].data) if i in texts else sourced.instruction
                        for i, sourced in enumerate([*agent._instructions, *agent._cap_instructions])
                    ]
                    stack.enter_context(agent.override(instructions=given))
            yield self.program

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the output of the agent's run; without an observed client, its history is the transcript."""
        deps = self.deps(task.sample.x) if callable(self.deps) else self.deps
        deps = await deps if isawaitable(deps) else deps
        with self.placed() as agent, capture_run_messages() as messages:
            try:
                result = await agent.run(prompt_of(task.sample.x), deps=deps, infer_name=False)
            finally:
                Calls().write(calls_of(messages))
        return Ran(output=result.output)


def bare(agent: Any) -> Agent[Any, Any]:
    """Return the agent inside wrappers."""
    while isinstance(agent, WrapperAgent):
        agent = agent.wrapped
    return agent


def prefix_of(name: str) -> str:
    """Return the prefix of the names of an agent's parameters.

    >>> prefix_of("refunds"), prefix_of("")
    ('refunds.', '')
    """
    return f"{name}." if name else ""


def _reach(agent: Agent[Any, Any], name: str, reached: Named) -> None:
    """Add an agent, and those that functions of its tools can name, each once."""
    if all(agent is not known for _, known in reached):
        reached.append((name, agent))
    for tool in _tools_of(agent):
        for variable, found in objects_read_by(tool.function, AbstractAgent):
            if all(bare(found) is not known for _, known in reached):
                _reach(bare(found), found.name or variable, reached)


def _tools_of(agent: Agent[Any, Any]) -> list[Tool[Any]]:
    found: list[Tool[Any]] = []

    def visit(toolset: Any) -> None:
        found.extend(toolset.tools.values() if isinstance(toolset, FunctionToolset) else ())

    for toolset in agent.toolsets:
        toolset.apply(visit)
    return found


def _instructions_of(agent: Agent[Any, Any], prefix: str) -> dict[int, HostParameter]:
    """Return position -> parameter of the fixed instructions; functions and templates are unchanged."""
    found: dict[int, HostParameter] = {}
    for i, sourced in enumerate(agent._instructions):
        instruction = sourced.instruction
        if isinstance(instruction, str | InstructionPart):
            own = instruction.name if isinstance(instruction, InstructionPart) else None
            name = f"instructions.{own}" if own else f"instructions_{len(found) + 1}" if found else "instructions"
            read, write = partial(_read_instruction, agent, i), partial(_write_instruction, agent, i)
            found[i] = HostParameter(read, write, name=f"{prefix}{name}", description="instructions of the agent")
    return found


def _read_instruction(agent: Agent[Any, Any], i: int) -> str:
    instruction = agent._instructions[i].instruction
    return str(instruction.content if isinstance(instruction, InstructionPart) else instruction)


def _write_instruction(agent: Agent[Any, Any], i: int, text: str) -> None:
    held = agent._instructions[i]
    agent._instructions[i] = replace(held, instruction=_with_text(held.instruction, text))


def _with_text(instruction: Any, text: str) -> Any:
    return replace(instruction, content=text) if isinstance(instruction, InstructionPart) else text


class _Prompts(tuple[str, ...]):  # noqa: SLOT001 - a tuple has no slots for attributes
    """The fixed system prompts of an agent, read from their parameters."""

    parameters: list[ParameterNode[Any]]

    def __iter__(self) -> Iterator[str]:
        return iter([parameter.data for parameter in self.parameters])

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


def _system_prompts_of(agent: Agent[Any, Any], prefix: str) -> list[ParameterNode[Any]]:
    held = agent._system_prompts
    if not held or isinstance(held, _Prompts):
        return held.parameters if held else []
    texts = list(held)
    made = _Prompts(texts)
    made.parameters = [
        HostParameter(
            partial(texts.__getitem__, i),
            partial(texts.__setitem__, i),
            name=f"{prefix}system_prompt_{i + 1}" if i else f"{prefix}system_prompt",
            description="system prompt of the agent",
        )
        for i in range(len(texts))
    ]
    agent._system_prompts = made
    return made.parameters


class _Described:
    """A tool's `prepare` that sets the description of the current context."""

    def __init__(self, tool: Tool[Any], name: str) -> None:
        self.given = tool.prepare
        self.parameter = HostParameter(
            lambda: tool.description,
            lambda text: setattr(tool, "description", text),
            name=name,
            description=f"description of the tool {tool.name} that the model reads",
        )

    async def __call__(self, context: Any, definition: ToolDefinition) -> ToolDefinition | None:
        described = replace(definition, description=self.parameter.data)
        found = self.given(context, described) if self.given else described
        return await found if isawaitable(found) else found


def _descriptions_of(agent: Agent[Any, Any], prefix: str) -> Iterator[ParameterNode[Any]]:
    for tool in _tools_of(agent):
        if tool.description and not isinstance(tool.prepare, _Described):
            tool.prepare = _Described(tool, f"{prefix}{tool.name}.description")
        if isinstance(tool.prepare, _Described):
            yield tool.prepare.parameter
