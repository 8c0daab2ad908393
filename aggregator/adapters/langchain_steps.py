"""A run of LangChain or LangGraph as a transcript: nodes, tools, and calls of models that are not seen otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages

from aggregator.adapters.frameworks import Calls
from aggregator.agents.transcripts import LLMCall, Span, current_transcript
from aggregator.records import Choice, Completion, Message, ToolCall, Usage
from aggregator.text import as_text


class Steps(BaseCallbackHandler):
    """The callbacks of one run, which write into the transcript that is current when they are made."""

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
        """Open the span of a node of a graph; other chains are not shown."""
        node = (named.get("metadata") or {}).get("langgraph_node")
        if node is not None and named.get("name") == node:
            self._open(run_id, f"node {node}", _readable(inputs))

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """Show what the node returned."""
        self._end(run_id, _readable(outputs))

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Show what the node raised."""
        self._fail(run_id, error)

    def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **named: Any) -> None:
        """Open the span of a tool."""
        name = (serialized or {}).get("name") or named.get("name") or "?"
        self._open(run_id, f"tool {name}", named.get("inputs") or input_str)

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """Show what the tool returned."""
        self._end(run_id, _readable(output))

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Show what the tool raised."""
        self._fail(run_id, error)

    def on_chat_model_start(
        self, serialized: Any, messages: Sequence[Sequence[BaseMessage]], *, run_id: UUID, **_: Any
    ) -> None:
        """Take the slot of a call."""
        self._asked[run_id] = self._calls.start(convert_to_openai_messages(list(messages[0])))

    def on_llm_start(self, serialized: Any, prompts: Sequence[str], *, run_id: UUID, **_: Any) -> None:
        """Take the slot of a call of a model that completes texts."""
        self._asked[run_id] = self._calls.start([{"role": "user", "content": prompts[0]}])

    def on_llm_end(self, response: Any, *, run_id: UUID, **_: Any) -> None:
        """Show the answer."""
        self._calls.end(self._asked.pop(run_id), completion_of(response.generations[0][0]))

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Show that there was no answer."""
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
    """Return messages as their texts, wherever a state or a command holds them; their ids differ in each run."""
    if isinstance(value, BaseMessage):
        return f"{value.type}: {value.text}"
    if hasattr(value, "goto") and hasattr(value, "update"):  # LangGraph's Command
        return _readable({"update": value.update, **({"goto": value.goto} if value.goto else {})})
    if isinstance(value, dict):
        return {key: _readable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    return value
