"""Our client as a LangChain chat model: its calls get our cassettes, budgets, limits, retries and lineage.

from langchain.agents import create_agent from aggregator import LLM from aggregator.hosts.langchain import model
support = create_agent(model(LLM("openai/gpt-4o-mini"), temperature=0), tools=[history], system_prompt="Route.")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.output_parsers.openai_tools import make_invalid_tool_call, parse_tool_call
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import Field

from aggregator.adapters.frameworks import require_version
from aggregator.errors import ConfigError
from aggregator.llm.client import LLM
from aggregator.llm.models import as_model
from aggregator.records import Completion, Message, Usage

_OPTIONS = {"max_tokens", "temperature", "top_p", "seed", "stop", "tools", "tool_choice", "response_format", "extra"}
_IGNORED = {"ls_structured_output_format", "stream", "stream_usage", "strict"}
_TURN = "aggregator.turn"
"""The key under which a message keeps our record of the turn, with signed thinking that a provider requires back."""


def model(llm: Any, **options: Any) -> ClientModel:
    """Return a client as a LangChain chat model; `llm` is an `LLM`, its name, or anything that `as_model` accepts.

    `options` are those of `LLM.complete` for each call, such as temperature and seed. Raises ConfigError for others.
    """
    require_version("langchain-core", "1.4", "2")
    _check(options)
    return ClientModel(llm=LLM(llm) if isinstance(llm, str) else as_model(llm), options=options)


class ClientModel(BaseChatModel):
    """A LangChain chat model that calls one of our clients."""

    llm: Any
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "aggregator"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self._name, **self.options}

    @property
    def _name(self) -> str:
        return str(getattr(self.llm, "model", type(self.llm).__name__))

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, strict: bool | None = None, **named: Any
    ) -> Any:
        """Return the model with tools; `tool_choice` is auto, any, none, a tool's name or OpenAI's dict."""
        declared = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        chosen = "required" if tool_choice in ("any", True) else tool_choice
        if isinstance(chosen, str) and chosen not in {"auto", "none", "required"}:
            chosen = {"type": "function", "function": {"name": chosen}}
        return self.bind(tools=declared, **({"tool_choice": chosen} if chosen else {}), **named)

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **named: Any
    ) -> ChatResult:
        return _result_of(self.llm(messages=_chat_of(messages), **self._asked(stop, named)))

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **named: Any
    ) -> ChatResult:
        return _result_of(await self.llm.complete(_chat_of(messages), **self._asked(stop, named)))

    async def _astream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **named: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        """Yield the text as it arrives, then the tool calls and the usage."""
        if not hasattr(self.llm, "stream"):
            raise ConfigError(f"Expected an LLM for an answer as it comes, got {self.llm!r}, which has no stream()")
        asked = self._asked(stop, named)
        if (form := asked.pop("response_format", None)) is not None:
            asked["extra"] = {"response_format": form, **(asked.get("extra") or {})}
        async with self.llm.stream(_chat_of(messages), **asked) as stream:
            async for text in stream:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(text)
                yield ChatGenerationChunk(message=AIMessageChunk(content=text))
        whole = _message_of(stream.completion)
        calls = [
            {"index": i, "id": call.id, "name": call.name, "args": call.arguments, "type": "tool_call_chunk"}
            for i, call in enumerate(stream.completion.tool_calls)
        ]
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                content="",
                tool_call_chunks=calls,
                usage_metadata=whole.usage_metadata,
                response_metadata=whole.response_metadata,
                additional_kwargs=whole.additional_kwargs,
            )
        )

    def _asked(self, stop: Any, named: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a call: the model's own, then those that were bound or passed."""
        given = {**self.options, **({"stop": stop} if stop else {}), **named}
        _check(given)
        return {name: value for name, value in given.items() if name in _OPTIONS and value is not None}


def _check(options: dict[str, Any]) -> None:
    if unknown := sorted(set(options) - _OPTIONS - _IGNORED):
        raise ConfigError(
            f"Expected the options {', '.join(sorted(_OPTIONS))}, got {', '.join(unknown)}; put what a provider takes "
            "in addition into extra"
        )


def _chat_of(messages: Sequence[BaseMessage]) -> list[Any]:
    """Return messages in OpenAI's shape; our answers with a record of the turn as that record."""
    chat: list[Any] = []
    for message in messages:
        if record := message.additional_kwargs.get(_TURN):
            chat.append(msgspec.convert(record, Message))
            continue
        shaped = convert_to_openai_messages(message)
        if shaped["role"] == "tool":
            shaped.pop("name", None)  # not a field of a tool's message
        chat.append(shaped)
    return chat


def _result_of(completion: Completion) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=_message_of(completion))])


def _message_of(completion: Completion) -> AIMessage:
    """Return our answer as LangChain's message; calls with invalid JSON arguments become its invalid calls."""
    message = completion.choices[0].message
    calls, invalid = [], []
    for call in message.tool_calls:
        raw = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        try:
            calls.append(parse_tool_call(raw, return_id=True))
        except Exception as error:  # noqa: BLE001 - LangChain's parser: the call goes to the agent as an invalid one
            invalid.append(make_invalid_tool_call(raw, str(error)))
    is_plain = message.source is None and all(call.signature is None for call in message.tool_calls)
    return AIMessage(
        content=message.content or "",
        tool_calls=calls,
        invalid_tool_calls=invalid,
        usage_metadata=_usage_of(completion.usage),
        response_metadata={"model_name": completion.model, "finish_reason": completion.finish_reason},
        additional_kwargs={} if is_plain else {_TURN: msgspec.to_builtins(message)},
    )


def _usage_of(usage: Usage) -> UsageMetadata:
    sent, answered = usage.input_tokens or 0, usage.output_tokens or 0
    return UsageMetadata(
        input_tokens=sent,
        output_tokens=answered,
        total_tokens=sent + answered,
        input_token_details={"cache_read": usage.cached_tokens or 0, "cache_creation": usage.cache_write_tokens or 0},
        output_token_details={"reasoning": usage.reasoning_tokens or 0},
    )
