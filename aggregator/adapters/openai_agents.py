"""Agents of the OpenAI Agents SDK: instructions, handoff descriptions and descriptions of tools are parameters.

All agents reachable by handoffs and tools are trained, and the ParameterNodes that functions name which return
instructions, or are tools. The SDK reads the texts at every turn; an adapted object returns
the text of the current context, so that concurrent candidates share the agents. Outside a run it is the stored text.

An adapted object gets a subclass in which a trained text is a property. Assigning to it works as before. Any copy is a
plain object of the SDK's class again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from inspect import isawaitable, isfunction
from typing import Any

from agents import Agent, FunctionTool, Handoff, ModelResponse, RunHooks, Runner
from agents.models.chatcmpl_converter import Converter

from aggregator.adapters.frameworks import Calls, FrameworkAgent, HostParameter, require_version
from aggregator.adapters.function import nodes_read_by, objects_read_by
from aggregator.agents.transcripts import Span, current_transcript
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import Choice, Completion, Message, RolloutTask, ToolCall, Usage
from aggregator.text import as_text

# ---- texts that the SDK reads in place

_TEXTS = "_aggregator_texts"


def reach(agent: Agent[Any], reached: list[Agent[Any]]) -> None:
    """Add an agent, and those reachable by its handoffs and tools, each once."""
    if any(agent is known for known in reached):
        return
    reached.append(agent)
    targets = [one if isinstance(one, Agent) else one._agent_ref and one._agent_ref() for one in agent.handoffs]
    for tool in agent.tools:
        targets.append(getattr(tool, "_agent_instance", None))
        targets += [one for function in _functions_of(tool) for _, one in objects_read_by(function, Agent)]
    for target in targets:
        if isinstance(target, Agent):
            reach(target, reached)


def _functions_of(tool: Any) -> list[Any]:
    """Return the user's functions behind a tool, which may run agents themselves."""
    invoked = getattr(getattr(tool, "on_invoke_tool", None), "_invoke_tool_impl", None)
    cells = getattr(invoked, "__closure__", None) or ()
    functions = [cell.cell_contents for cell in cells if isfunction(cell.cell_contents)]
    return [one for one in functions if not one.__module__.startswith("agents.")]


def texts_of(agents: Sequence[Agent[Any]]) -> Iterator[HostParameter]:
    """Yield a parameter for each fixed text, the instructions first; a shared tool has one parameter."""
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
    """Yield the parameter of an object's text, if it has one; the object now reads it."""
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
    """An attribute with the text of the current context; on an object without a parameter, the assigned value."""

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
    """Return a subclass that reads the texts of the current context."""
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


# ---- the agent


def adapt(
    thing: Any, *, context: Any = None, agents: Sequence[Any] = (), run_config: Any = None, max_turns: int = 10
) -> OpenAIAgent | None:
    """Return an agent of the OpenAI Agents SDK as one of ours; None for another object of the package.

    `context` is each run's, or a function of the input that returns it. `agents` are further agents to train, which no
    handoff and no `as_tool` reaches. `run_config` and `max_turns` are those of `Runner.run`.
    """
    if not isinstance(thing, Agent):
        return None
    return OpenAIAgent(thing, context=context, agents=agents, run_config=run_config, max_turns=max_turns)


class OpenAIAgent(FrameworkAgent):
    """An agent of the OpenAI Agents SDK and those that it reaches.

    Raises ConfigError for an unsupported version, agents without a text to train, and two agents with one name.
    """

    def __init__(
        self,
        program: Any,
        *,
        context: Any = None,
        agents: Sequence[Any] = (),
        run_config: Any = None,
        max_turns: int = 10,
    ) -> None:
        require_version("openai-agents", "0.20", "1")
        self.options = {"context": context, "agents": agents, "run_config": run_config, "max_turns": max_turns}
        reached: list[Agent[Any]] = []
        for agent in [program, *agents]:
            reach(agent, reached)
        functions = [one for agent in reached for tool in agent.tools for one in _functions_of(tool)]
        instructions = [agent.instructions for agent in reached]
        super().__init__(program, nodes_read_by([*instructions, *functions], list(texts_of(reached))))

    def like(self, program: Any) -> OpenAIAgent:
        """Return an agent with the same options around another program."""
        return OpenAIAgent(program, **self.options)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the final output of the run; tools, handoffs and model calls are shown in the transcript."""
        x, context = task.sample.x, self.options["context"]
        context = context(x) if callable(context) else context
        result = await Runner.run(
            self.program,
            x if isinstance(x, str | list) else as_text(x),
            context=await context if isawaitable(context) else context,
            hooks=Steps(),
            max_turns=self.options["max_turns"],
            **({} if self.options["run_config"] is None else {"run_config": self.options["run_config"]}),
        )
        return Ran(output=result.final_output)


class Steps(RunHooks[Any]):
    """The hooks of one run, which write to the transcript that is current at construction."""

    def __init__(self) -> None:
        self._transcript = current_transcript()
        self._calls = Calls()
        self._asked: dict[int, Any] = {}
        self._spans: dict[str, Span] = {}

    async def on_llm_start(self, context: Any, agent: Any, system_prompt: str | None, input_items: Any) -> None:
        """Take the slot of a call."""
        self._asked[id(agent)] = self._calls.start(chat_of(system_prompt, input_items))

    async def on_llm_end(self, context: Any, agent: Any, response: Any) -> None:
        """Record the answer."""
        self._calls.end(self._asked.pop(id(agent)), completion_of(response))

    async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
        """Open the span of a tool, at its start."""
        if self._transcript is not None:
            arguments = getattr(context, "tool_arguments", "")
            span = Span(f"tool {tool.name}", inputs=[("arguments", arguments)])
            self._spans[getattr(context, "tool_call_id", tool.name)] = span
            self._transcript.root.add(span)

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: object) -> None:
        """Record the tool's result."""
        if span := self._spans.pop(getattr(context, "tool_call_id", tool.name), None):
            span.finish(result)

    async def on_handoff(self, context: Any, from_agent: Any, to_agent: Any) -> None:
        """Record a handoff."""
        if self._transcript is not None:
            span = Span(f"handoff from {from_agent.name}")
            span.finish(to_agent.name)
            self._transcript.root.add(span)


def chat_of(system_prompt: str | None, items: Any) -> list[Any]:
    """Return a model's input as messages in OpenAI's shape."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, *Converter.items_to_messages(items)]


def completion_of(response: ModelResponse) -> Completion:
    """Return a model's answer as our record: its text and its tool calls."""
    texts, calls = [], []
    for item in response.output:
        if item.type == "message":
            texts += [getattr(part, "text", getattr(part, "refusal", "")) for part in item.content]
        elif item.type == "function_call":
            calls.append(ToolCall(id=item.call_id, name=item.name, arguments=item.arguments))
    usage = Usage(input_tokens=response.usage.input_tokens, output_tokens=response.usage.output_tokens)
    message = Message(content="".join(texts) or None, tool_calls=tuple(calls))
    return Completion(choices=(Choice(message=message),), usage=usage, id=response.response_id or "")
