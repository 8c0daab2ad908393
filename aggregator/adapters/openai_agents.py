"""Agents of the OpenAI Agents SDK: instructions, handoff descriptions and descriptions of tools are parameters.

All agents are trained that handoffs and tools lead to. The SDK reads the texts at every turn; an adapted object answers
with the text of the current context, so that concurrent candidates share the agents. Outside of a run it is the stored
text, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import isawaitable
from typing import Any

from agents import Agent, ModelResponse, RunHooks, Runner
from agents.models.chatcmpl_converter import Converter

from aggregator.adapters.frameworks import Calls, FrameworkAgent, require_version
from aggregator.adapters.openai_agents_texts import reach, texts_of
from aggregator.agents.transcripts import Span, current_transcript
from aggregator.executors.work import Ran
from aggregator.guides.calling import Call
from aggregator.records import Choice, Completion, Message, RolloutTask, ToolCall, Usage
from aggregator.text import as_text


def adapt(
    thing: Any, *, context: Any = None, agents: Sequence[Any] = (), run_config: Any = None, max_turns: int = 10
) -> OpenAIAgent | None:
    """Return an agent of the OpenAI Agents SDK as one of ours; None for another object of the package.

    `context` is that of each run, or a function of the input that returns it. `agents` are others to be trained with
    it, which no handoff and no `as_tool` leads to. `run_config` and `max_turns` are those of `Runner.run`.
    """
    if not isinstance(thing, Agent):
        return None
    return OpenAIAgent(thing, context=context, agents=agents, run_config=run_config, max_turns=max_turns)


class OpenAIAgent(FrameworkAgent):
    """An agent of the OpenAI Agents SDK and those that it leads to.

    Raises ConfigError for an unsupported version, agents without a fixed text, and two agents of one name.
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
        super().__init__(program, list(texts_of(reached)))

    def like(self, program: Any) -> OpenAIAgent:
        """Return an agent with this one's options around another program."""
        return OpenAIAgent(program, **self.options)

    async def run(self, task: RolloutTask, call: Call) -> Ran:
        """Return the final output of the run; tools, handoffs and calls of models are shown in the transcript."""
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
    """The hooks of one run, which write into the transcript that is current when they are made."""

    def __init__(self) -> None:
        self._transcript = current_transcript()
        self._calls = Calls()
        self._asked: dict[int, Any] = {}
        self._spans: dict[str, Span] = {}

    async def on_llm_start(self, context: Any, agent: Any, system_prompt: str | None, input_items: Any) -> None:
        """Take the slot of a call."""
        self._asked[id(agent)] = self._calls.start(chat_of(system_prompt, input_items))

    async def on_llm_end(self, context: Any, agent: Any, response: Any) -> None:
        """Show the answer."""
        self._calls.end(self._asked.pop(id(agent)), completion_of(response))

    async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
        """Open the span of a tool, at the place where it began."""
        if self._transcript is not None:
            arguments = getattr(context, "tool_arguments", "")
            span = Span(f"tool {tool.name}", inputs=[("arguments", arguments)])
            self._spans[getattr(context, "tool_call_id", tool.name)] = span
            self._transcript.root.add(span)

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: object) -> None:
        """Show what the tool returned."""
        if span := self._spans.pop(getattr(context, "tool_call_id", tool.name), None):
            span.finish(result)

    async def on_handoff(self, context: Any, from_agent: Any, to_agent: Any) -> None:
        """Show a handoff."""
        if self._transcript is not None:
            span = Span(f"handoff from {from_agent.name}")
            span.finish(to_agent.name)
            self._transcript.root.add(span)


def chat_of(system_prompt: str | None, items: Any) -> list[Any]:
    """Return what a model was given as messages in OpenAI's shape."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, *Converter.items_to_messages(items)]


def completion_of(response: ModelResponse) -> Completion:
    """Return what a model answered as our record: its text, and the tools that it called."""
    texts, calls = [], []
    for item in response.output:
        if item.type == "message":
            texts += [getattr(part, "text", getattr(part, "refusal", "")) for part in item.content]
        elif item.type == "function_call":
            calls.append(ToolCall(id=item.call_id, name=item.name, arguments=item.arguments))
    usage = Usage(input_tokens=response.usage.input_tokens, output_tokens=response.usage.output_tokens)
    message = Message(content="".join(texts) or None, tool_calls=tuple(calls))
    return Completion(choices=(Choice(message=message),), usage=usage, id=response.response_id or "")
