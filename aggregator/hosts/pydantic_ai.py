"""Our client as a pydantic-ai model: its calls get our cassettes, budgets, limits, retries and lineage.

from pydantic_ai import Agent
from aggregator import LLM
from aggregator.hosts.pydantic_ai import model

support = Agent(model(LLM("openai/gpt-4o-mini")), instructions="Route the ticket.")
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio
import msgspec
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ThinkingPart, ToolCallPart
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import RequestUsage

from aggregator.adapters.frameworks import require_version
from aggregator.adapters.pydantic_ai import chat_of
from aggregator.checks import is_finite
from aggregator.errors import APITimeoutError, ConfigError, ModelWarning
from aggregator.llm.client import LLM
from aggregator.llm.models import as_model
from aggregator.records import Completion, Message, Usage

_OPTIONS = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop_sequences": "stop",
    "extra_body": "extra",
}
"""Settings of pydantic-ai -> options of our calls."""
_OWN = {"timeout", "tool_choice"}
_LEFT_OUT = {
    "parallel_tool_calls": "put it into extra_body in the words of the provider",
    "extra_headers": "give them to the client, as in LLM(..., headers={...})",
}
"""Settings that are not passed on, with what to do instead: a warning, since defaults of an application set them."""
_ENDINGS = {"stop": "stop", "length": "length", "content_filter": "content_filter", "tool_calls": "tool_call"}
_TURN = "aggregator.turn"
"""The key under which a response keeps our record of the turn, with signed thinking that a provider requires back."""


def model(llm: Any) -> ClientModel:
    """Return a client as a pydantic-ai model; `llm` is an `LLM`, its name, or anything that `as_model` accepts."""
    require_version("pydantic-ai-slim", "2.40", "3")
    return ClientModel(LLM(llm) if isinstance(llm, str) else as_model(llm))


class ClientModel(Model[Any]):
    """A pydantic-ai model that calls one of our clients.

    Raises ConfigError for settings that it cannot pass on.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        super().__init__(profile={"supports_json_schema_output": True, "supports_json_object_output": True})

    @property
    def model_name(self) -> str:
        """The name of the client's model."""
        return str(getattr(self.llm, "model", type(self.llm).__name__))

    @property
    def system(self) -> str:
        """The name of this library."""
        return "aggregator"

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Make one call. Raises the errors of `LLM.complete`."""
        chat, options = self._call(messages, model_settings, model_request_parameters)
        with _limit(model_settings):
            completion: Completion = await self.llm.complete(chat, **options)
        message = completion.choices[0].message
        parts: list[Any] = [ThinkingPart(message.reasoning)] if message.reasoning else []
        parts += [TextPart(message.content)] if message.content else []
        parts += [ToolCallPart(call.name, call.arguments, tool_call_id=call.id) for call in message.tool_calls]
        return ModelResponse(
            parts,
            usage=_usage_of(completion.usage),
            model_name=completion.model or self.model_name,
            provider_name=self.system,
            provider_details=_details_of(message),
            provider_response_id=completion.id or None,
            finish_reason=_ENDINGS.get(completion.finish_reason),
        )

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: Any = None,
    ) -> AsyncIterator[StreamedResponse]:
        """Make one call and yield the text as it arrives; tool calls follow at the end."""
        if not hasattr(self.llm, "stream"):
            raise ConfigError(f"Expected an LLM for an answer as it comes, got {self.llm!r}, which has no stream()")
        chat, options = self._call(messages, model_settings, model_request_parameters)
        form = options.pop("response_format", None)
        if form is not None:
            options["extra"] = {"response_format": form, **(options.get("extra") or {})}
        async with AsyncExitStack() as stack:
            with _limit(model_settings):
                stream = await stack.enter_async_context(self.llm.stream(chat, **options))
            yield ClientStream(model_request_parameters, stream, self.model_name, self.system)

    def _call(
        self, messages: list[ModelMessage], settings: ModelSettings | None, parameters: ModelRequestParameters
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return messages in OpenAI's shape and the options of a call."""
        settings, parameters = self.prepare_request(settings, parameters)
        given: dict[str, Any] = {**(settings or {})}
        if unknown := sorted(set(given) - set(_OPTIONS) - set(_LEFT_OUT) - _OWN):
            raise ConfigError(
                f"Expected the settings {', '.join(sorted(_OPTIONS))}, got {', '.join(unknown)}; put what a provider "
                "takes in addition into extra_body"
            )
        options = {ours: given[theirs] for theirs, ours in _OPTIONS.items() if theirs in given}
        for name in sorted(given.keys() & _LEFT_OUT.keys()):
            warnings.warn(
                f"Expected settings that {type(self).__name__} passes on, got {name}, which is left out; "
                f"{_LEFT_OUT[name]}",
                ModelWarning,
                stacklevel=2,
            )
        tools, choice = _chosen(given.get("tool_choice"), parameters)
        if tools:
            options |= {"tools": [_tool_of(tool) for tool in tools], "tool_choice": choice}
        if parameters.output_mode == "native" and parameters.output_object is not None:
            wanted = parameters.output_object
            schema = {
                "name": wanted.name or "final_result",
                "schema": wanted.json_schema,
                "strict": bool(wanted.strict),
            }
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        instructions = "\n\n".join(part.content for part in self._get_instruction_parts(messages, parameters) or [])
        return _with_turns(chat_of(messages, instructions), messages), options


@dataclass
class ClientStream(StreamedResponse):
    """The answer as it arrives."""

    stream: Any
    name: str
    provider: str
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    async def _get_event_iterator(self) -> AsyncIterator[Any]:
        async for delta in self.stream:
            for event in self._parts_manager.handle_text_delta(vendor_part_id="content", content=delta):
                yield event
        completion: Completion = self.stream.completion
        message = completion.choices[0].message
        for call in message.tool_calls:
            yield self._parts_manager.handle_tool_call_part(
                vendor_part_id=None, tool_name=call.name, args=call.arguments, tool_call_id=call.id or None
            )
        self._usage = _usage_of(completion.usage)
        self.provider_details = _details_of(message)
        self.provider_response_id = completion.id or None
        self.finish_reason = _ENDINGS.get(completion.finish_reason)

    async def close_stream(self) -> None:
        """End the request."""
        await self.stream.aclose()

    @property
    def model_name(self) -> str:
        """The name of the client's model."""
        return self.name

    @property
    def provider_name(self) -> str:
        """The name of this library."""
        return self.provider

    @property
    def provider_url(self) -> None:
        """None: the client knows its address."""
        return

    @property
    def timestamp(self) -> datetime:
        """The time of the request."""
        return self.started


@contextmanager
def _limit(settings: ModelSettings | None) -> Iterator[None]:
    """Let a call, or the beginning of a stream, take the setting `timeout` at most; raises APITimeoutError."""
    seconds: Any = (settings or {}).get("timeout")
    if seconds is not None and not (is_finite(seconds) and seconds > 0):
        raise ConfigError(f"Expected the setting timeout in seconds above 0, got {seconds!r}")
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise APITimeoutError(f"Expected an answer within the setting timeout={seconds:g} s, got none")


def _chosen(choice: Any, parameters: ModelRequestParameters) -> tuple[list[Any], str]:
    """Return the tools that a call may use by the setting `tool_choice`, and its choice in OpenAI's words.

    As in pydantic-ai, "required" is about function tools, "none" leaves those of the output, a list names all that may
    be used, and ToolOrOutput the function tools with the output.
    """
    functions, outputs = parameters.declared_function_tools, parameters.output_tools
    usual = "auto" if parameters.allow_text_output else "required"
    if choice in (None, "auto"):
        return [*functions, *outputs], usual
    if choice == "required":
        return list(functions), "required"
    if choice in ("none", []):
        return (list(outputs), usual) if outputs else (list(functions), "none")
    named = choice if isinstance(choice, list) else [*choice.function_tools, *(tool.name for tool in outputs)]
    kept = [tool for tool in (*functions, *outputs) if tool.name in named]
    if not kept:
        raise ConfigError(f"Expected tool_choice to name tools of the agent, got {choice!r}")
    return kept, "required" if isinstance(choice, list) else usual


def _tool_of(tool: Any) -> dict[str, Any]:
    strict = {} if tool.strict is None else {"strict": tool.strict}
    described = {"description": tool.description} if tool.description else {}
    function = {"name": tool.name, **described, "parameters": tool.parameters_json_schema, **strict}
    return {"type": "function", "function": function}


def _usage_of(usage: Usage) -> RequestUsage:
    return RequestUsage(
        input_tokens=usage.input_tokens or 0,
        output_tokens=usage.output_tokens or 0,
        cache_read_tokens=usage.cached_tokens or 0,
        cache_write_tokens=usage.cache_write_tokens or 0,
    )


def _details_of(message: Message) -> dict[str, Any] | None:
    """Return our record of a turn, if it holds something that the shape of a chat cannot."""
    if message.source is None and all(call.signature is None for call in message.tool_calls):
        return None
    return {_TURN: msgspec.to_builtins(message)}


def _with_turns(chat: list[dict[str, Any]], messages: Sequence[ModelMessage]) -> list[Any]:
    """Return a chat in which answers are our own records, if a response keeps one."""
    kept = iter([(one.provider_details or {}).get(_TURN) for one in messages if isinstance(one, ModelResponse)])
    turns: list[Any] = []
    for message in chat:
        record = next(kept) if message["role"] == "assistant" else None
        turns.append(msgspec.convert(record, Message) if record else message)
    return turns
