"""Our client as a model of the OpenAI Agents SDK: its calls get our cassettes, budgets, limits, retries and lineage.

from agents import Agent, RunConfig, Runner
from aggregator import LLM
from aggregator.hosts.openai_agents import model, provider
support = Agent(name="support", model=model(LLM("openai/gpt-4o-mini")), instructions="Route the ticket.")
Runner.run_sync(agent, "Where is it?", run_config=RunConfig(model_provider=provider()))    # models by their names
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from agents import Model, ModelProvider, ModelResponse, ModelSettings, Usage
from agents.models.chatcmpl_converter import Converter
from agents.models.chatcmpl_stream_handler import ChatCmplStreamHandler
from agents.models.fake_id import FAKE_RESPONSES_ID
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessage
from openai.types.responses import Response
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from aggregator.adapters.frameworks import require_version
from aggregator.errors import ConfigError
from aggregator.llm.client import LLM
from aggregator.llm.models import as_model
from aggregator.records import Completion

_OPTIONS = ("temperature", "top_p", "max_tokens")
_IN_BODY = ("frequency_penalty", "presence_penalty", "parallel_tool_calls", "metadata")
_REFUSED = ("top_logprobs", "extra_query", "extra_headers", "truncation", "response_include", "context_management")


def model(llm: Any) -> ClientModel:
    """Return a client as a model of the SDK; `llm` is an `LLM`, its name, or anything that `as_model` accepts."""
    require_version("openai-agents", "0.20", "1")
    return ClientModel(LLM(llm) if isinstance(llm, str) else as_model(llm))


def provider(make: Callable[[str | None], Any] = LLM) -> ClientProvider:
    """Return a provider of models by name: `make(name)` returns the client, and is called once per name."""
    require_version("openai-agents", "0.20", "1")
    return ClientProvider(make)


class ClientProvider(ModelProvider):
    """Provides one of our clients for each name of a model."""

    def __init__(self, make: Callable[[str | None], Any]) -> None:
        self._make = make
        self._made: dict[str | None, ClientModel] = {}

    def get_model(self, model_name: str | None) -> ClientModel:
        """Return the model of a name; None means the default model. Raises the errors of `make`."""
        if model_name not in self._made:
            self._made[model_name] = ClientModel(as_model(self._make(model_name)))
        return self._made[model_name]


class ClientModel(Model):
    """A model of the SDK that calls one of our clients.

    Raises ConfigError for settings that chat completions lack, such as a stored conversation.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.model = str(getattr(llm, "model", type(llm).__name__))

    async def get_response(self, *given: Any, **named: Any) -> ModelResponse:
        """Make one call. Raises the errors of `LLM.complete`."""
        asked = _asked(*given, **named)
        completion: Completion = await self.llm.complete(asked.pop("messages"), **asked)
        items = Converter.message_to_output_items(_message_of(completion))
        return ModelResponse(output=items, usage=_usage_of(completion), response_id=None)

    async def stream_response(self, *given: Any, **named: Any) -> AsyncIterator[Any]:
        """Make one call and yield the SDK's events as the text arrives; tool calls follow at the end."""
        if not hasattr(self.llm, "stream"):
            raise ConfigError(f"Expected an LLM for an answer as it comes, got {self.llm!r}, which has no stream()")
        asked = _asked(*given, **named)
        if (form := asked.pop("response_format", None)) is not None:
            asked["extra"] = {"response_format": form, **asked.get("extra", {})}
        response = Response(
            id=FAKE_RESPONSES_ID,
            created_at=0,
            model=self.model,
            object="response",
            output=[],
            tool_choice="auto",
            tools=[],
            parallel_tool_calls=False,
        )
        async with self.llm.stream(asked.pop("messages"), **asked) as stream:
            async for event in ChatCmplStreamHandler.handle_stream(response, self._chunks(stream), model=self.model):
                yield event

    async def _chunks(self, stream: Any) -> AsyncIterator[ChatCompletionChunk]:
        """Yield our answer as chunks of a chat completion."""
        async for text in stream:
            yield self._chunk({"delta": {"role": "assistant", "content": text}, "finish_reason": None})
        completion: Completion = stream.completion
        for i, call in enumerate(completion.tool_calls):
            function = {"name": call.name, "arguments": call.arguments}
            called = {"index": i, "id": call.id, "type": "function", "function": function}
            yield self._chunk({"delta": {"tool_calls": [called]}, "finish_reason": None})
        usage = _usage_of(completion)
        counts = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
        }
        ending = "tool_calls" if completion.tool_calls else completion.finish_reason
        yield self._chunk({"delta": {}, "finish_reason": ending}, usage=counts)

    def _chunk(self, choice: dict[str, Any], **fields: Any) -> ChatCompletionChunk:
        return ChatCompletionChunk.model_validate(
            {
                "id": FAKE_RESPONSES_ID,
                "created": 0,
                "model": self.model,
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, **choice}],
                **fields,
            }
        )


def _asked(
    system_instructions: str | None,
    input: Any,  # noqa: A002 - the SDK's name
    model_settings: ModelSettings,
    tools: Any,
    output_schema: Any,
    handoffs: Any,
    tracing: Any = None,
    *,
    previous_response_id: str | None = None,
    conversation_id: str | None = None,
    prompt: Any = None,
) -> dict[str, Any]:
    """Return an SDK request as the messages and options of `LLM.complete`."""
    state = {"previous_response_id": previous_response_id, "conversation_id": conversation_id, "prompt": prompt}
    refused = [*(name for name, value in state.items() if value), *(n for n in _REFUSED if _set(model_settings, n))]
    if refused:
        raise ConfigError(f"Expected a request that a chat can carry, got {', '.join(refused)}; leave them out")
    system = [{"role": "system", "content": system_instructions}] if system_instructions else []
    asked: dict[str, Any] = {"messages": [*system, *Converter.items_to_messages(input)]}
    asked |= {name: value for name in _OPTIONS if (value := _set(model_settings, name)) is not None}
    declared = [*map(Converter.tool_to_openai, tools), *map(Converter.convert_handoff_tool, handoffs)]
    if declared:
        asked["tools"] = declared
    asked |= dict(_chosen("tool_choice", Converter.convert_tool_choice(model_settings.tool_choice)) if declared else ())
    asked |= dict(_chosen("response_format", Converter.convert_response_format(output_schema)))
    extra = {name: value for name in _IN_BODY if (value := _set(model_settings, name)) is not None}
    extra |= {**(model_settings.extra_body or {}), **(model_settings.extra_args or {})}
    if "seed" in extra:
        asked["seed"] = extra.pop("seed")
    return asked | ({"extra": extra} if extra else {})


def _set(settings: ModelSettings, name: str) -> Any:
    return getattr(settings, name, None)


def _chosen(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an option unless it is the SDK's marker for an omitted one."""
    if isinstance(value, str | dict):
        yield name, value


def _message_of(completion: Completion) -> ChatCompletionMessage:
    """Return our answer as OpenAI's message."""
    message = completion.choices[0].message
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    fields = {"content": message.content, "refusal": message.refusal, "tool_calls": calls or None}
    return ChatCompletionMessage.model_validate({"role": "assistant", **fields})


def _usage_of(completion: Completion) -> Usage:
    usage = completion.usage
    sent, answered = usage.input_tokens or 0, usage.output_tokens or 0
    return Usage(
        requests=1,
        input_tokens=sent,
        output_tokens=answered,
        total_tokens=sent + answered,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.cached_tokens or 0, cache_write_tokens=usage.cache_write_tokens or 0
        ),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens or 0),
    )
