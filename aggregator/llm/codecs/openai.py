"""OpenAI's chat completions, as OpenAI and the many servers that speak it really send them.

Recorded from OpenAI, Azure, OpenRouter, Mistral, DeepSeek, Groq, Together, vLLM, llama.cpp, Ollama and others: content
null, absent, a list of parts or an object; three names for reasoning; usage with floats, nulls and objects inside.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from aggregator.errors import APIStatusError, ContentFilterError, EmptyResponseError
from aggregator.llm.calls import ChatCall, StreamReader, Target
from aggregator.llm.codecs.failures import fault_inside, request_id, status_error
from aggregator.llm.codecs.finish import finish_reason
from aggregator.llm.codecs.lenient import excerpt, read
from aggregator.llm.codecs.requests import api_key, post
from aggregator.llm.codecs.thinking import OPEN, split_thinking
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage

_REASONING_MODEL = re.compile(r"(?:ft:)?(?:o\d|gpt-[5-9]|gpt-\d\d|codex)")


class _Function(Struct):
    name: str | None = None
    arguments: Any = None


class _Custom(Struct):
    name: str | None = None
    input: Any = None


class _ToolCall(Struct):
    id: str | None = None
    function: _Function | None = None
    custom: _Custom | None = None
    index: int | None = None


class _Message(Struct):
    content: Any = None
    tool_calls: list[_ToolCall] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: list[Any] | None = None
    refusal: str | None = None
    function_call: _Function | None = None


class _Choice(Struct):
    message: _Message | None = None
    delta: _Message | None = None
    finish_reason: str | None = None
    index: int | None = None
    text: str | None = None
    error: Any = None


class _Details(Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None
    cached_tokens: int | None = None
    num_cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: Any = None


class _Answer(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    model: str | None = None
    id: str | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Answer)


class OpenAIChat:
    """The codec of chat completions, bound to one server."""

    def __init__(self, target: Target) -> None:
        self.target = target
        host = urlsplit(target.base_url).hostname or ""
        self._official = host.endswith(("api.openai.com", ".azure.com"))

    def url(self, call: ChatCall) -> str:
        """Where this call is posted."""
        address, question, query = self.target.base_url.partition("?")
        return f"{address.rstrip('/')}/chat/completions{question}{query}"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; what was not said is not sent."""
        options = self.target.options
        cap = call.max_tokens if call.max_tokens is not None else options.get("max_tokens")
        newer = self._official and _REASONING_MODEL.match(call.model) is not None
        fields = {
            "model": call.model,
            "messages": call.messages,
            "max_completion_tokens" if newer else "max_tokens": cap,
            "temperature": call.temperature,
            "top_p": call.top_p,
            "n": call.n,
            options.get("seed", "seed"): call.seed,
            "stop": call.stop,
            "response_format": call.response_format,
            "tools": call.tools,
            "tool_choice": call.tool_choice,
            "stream": call.stream or None,
            "stream_options": {"include_usage": True} if call.stream and options.get("stream_options", True) else None,
        }
        body = {name: value for name, value in fields.items() if value is not None}
        return post(self.target, self.url(call), {**body, **call.extra}, stream=call.stream)

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer in whatever shape it came."""
        return self.completion(read(reply.body, _DECODER), reply)

    def completion(self, answer: _Answer, reply: HTTPReply) -> Completion:
        """Turn a parsed answer into a Completion; raises where it is an error or holds no message."""
        if answer.error:
            raise fault_inside(answer.error, reply, self.target.provider, self._secrets())
        if not answer.choices:
            raise EmptyResponseError(
                f"Expected choices from {self.target.provider}, got none in {excerpt(reply.body)}",
                status=reply.status,
                request_id=request_id(reply.headers),
            )
        return Completion(
            choices=tuple([self._choice(choice, i, reply) for i, choice in enumerate(answer.choices)]),
            usage=_usage(answer.usage) if answer.usage else Usage(),
            model=answer.model or "",
            id=answer.id or "",
            request_id=request_id(reply.headers),
            milliseconds=reply.milliseconds,
            replayed=reply.replayed,
            raw=reply.body,
        )

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of an error status."""
        return status_error(reply, self.target.provider, self._secrets())

    def stream(self, call: ChatCall) -> StreamReader:
        """Return a reader for a streamed answer."""
        raise NotImplementedError

    def _secrets(self) -> tuple[str, ...]:
        key = api_key(self.target)
        return (key,) if key else ()

    def _choice(self, choice: _Choice, position: int, reply: HTTPReply) -> Choice:
        message = choice.message or choice.delta
        if message is None:
            if choice.error:
                raise fault_inside(choice.error, reply, self.target.provider, self._secrets())
            if choice.text is None:
                raise self._no_message(choice, reply)
            message = _Message(content=choice.text)
        return Choice(
            message=_message(message),
            finish_reason=finish_reason(choice.finish_reason),
            raw_finish_reason=choice.finish_reason,
            index=position if choice.index is None else choice.index,
        )

    def _no_message(self, choice: _Choice, reply: HTTPReply) -> Exception:
        filtered = finish_reason(choice.finish_reason) == "content_filter"
        kind = ContentFilterError if filtered else EmptyResponseError
        return kind(
            f"Expected a message from {self.target.provider}, got a choice without one "
            f"(finish_reason {choice.finish_reason!r}){'; change the prompt or the filter' if filtered else ''}",
            status=reply.status,
            code=choice.finish_reason,
            request_id=request_id(reply.headers),
        )


def _message(message: _Message) -> Message:
    content = message.content
    thoughts: list[str] = []
    if content is not None and type(content) is not str:
        content, thoughts = _joined(content)
    if content and OPEN in content:
        content, thought = split_thinking(content)
        thoughts.append(thought)
    calls = message.tool_calls
    return Message(
        content=content,
        reasoning=_reasoning(message, thoughts),
        tool_calls=_calls(message) if calls or message.function_call else (),
        refusal=message.refusal or None,
    )


def _joined(content: Any) -> tuple[str, list[str]]:
    """Content as parts (Mistral's thinking) or as an object (Cloudflare's json_schema) -> text and thinking."""
    if not isinstance(content, list):
        return msgspec.json.encode(content).decode(), []
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type") in ("thinking", "reasoning"):
            inner = part.get("thinking") or part.get("reasoning") or ""
            thoughts.append(inner if isinstance(inner, str) else _joined(inner)[0])
    return "".join(texts), thoughts


def _reasoning(message: _Message, thoughts: list[str]) -> str | None:
    stated = message.reasoning_content or message.reasoning
    if isinstance(stated, str):
        thoughts = [stated, *thoughts]
    elif not thoughts and message.reasoning_details:
        details = [detail for detail in message.reasoning_details if isinstance(detail, dict)]
        thoughts = [text for d in details if isinstance(text := d.get("text") or d.get("summary"), str)]
    return "".join(thoughts) or None if thoughts else None


def _calls(message: _Message) -> tuple[ToolCall, ...]:
    """Tool calls with the model's own argument text; the legacy `function_call` counts where it names a function."""
    found = []
    for call in message.tool_calls or ():
        function = call.function
        if function is not None:
            found.append(ToolCall(id=call.id or "", name=function.name or "", arguments=_arguments(function.arguments)))
        elif call.custom is not None:
            found.append(
                ToolCall(id=call.id or "", name=call.custom.name or "", arguments=_arguments(call.custom.input))
            )
    legacy = message.function_call
    if not found and legacy is not None and legacy.name:
        found.append(ToolCall(id="", name=legacy.name, arguments=_arguments(legacy.arguments)))
    return tuple(found)


def _arguments(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def _usage(usage: _Usage) -> Usage:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    cached = prompt.cached_tokens if prompt is not None else None
    if cached is None:
        cached = next(
            (n for n in (usage.prompt_cache_hit_tokens, usage.cached_tokens, usage.num_cached_tokens) if n is not None),
            None,
        )
    reasoning = completion.reasoning_tokens if completion is not None else None
    return Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        cached_tokens=cached,
        reasoning_tokens=usage.reasoning_tokens if reasoning is None else reasoning,
        cost=_cost(usage.cost) if usage.cost is not None else None,
    )


def _cost(cost: Any) -> float | None:
    """USD: a number (OpenRouter) or an object with a total (Perplexity)."""
    if isinstance(cost, dict):
        cost = cost.get("total_cost")
    return float(cost) if isinstance(cost, int | float) else None
