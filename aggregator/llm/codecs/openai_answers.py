"""What chat completions answer, typed leniently, and its parts in our words.

Recorded from OpenAI, Azure, OpenRouter, Mistral, DeepSeek, Groq, Together, vLLM, llama.cpp, Ollama and others: content
null, absent, a list of parts or an object; three names for reasoning; usage with floats, nulls and objects inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.llm.codecs.wire import may_think, split_thinking
from aggregator.llm.messages import Turn
from aggregator.records import Message, ToolCall, Usage


class WireFunction(Struct, gc=False):
    """A function the model wants called; `arguments` is text, or an object where a gateway parsed it."""

    name: str | None = None
    arguments: Any = None


class WireCustom(Struct, gc=False):
    """A custom tool's call, with free text as its input."""

    name: str | None = None
    input: Any = None


class WireToolCall(Struct, gc=False):
    """One tool call, or a piece of one in a stream."""

    id: str | None = None
    function: WireFunction | None = None
    custom: WireCustom | None = None
    index: int | None = None
    extra_content: Any = None  # of Gemini's: the signature of its thinking


class WireMessage(Struct, gc=False):
    """A message, or a delta of one; `content` may be text, parts or an object."""

    content: Any = None
    tool_calls: list[WireToolCall] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: list[Any] | None = None
    refusal: str | None = None
    function_call: WireFunction | None = None
    audio: Any = None
    images: Any = None


class WireChoice(Struct, gc=False):
    """One choice; Azure's content filter sends one without any message."""

    message: WireMessage | None = None
    delta: WireMessage | None = None
    finish_reason: str | None = None
    index: int | None = None
    text: str | None = None
    error: Any = None


class WirePromptDetails(Struct, gc=False):
    """What part of the input was cached, or written to a cache (OpenRouter)."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class WireCompletionDetails(Struct, gc=False):
    """What part of the output was thinking."""

    reasoning_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """Token counts under the names of OpenAI, DeepSeek, Moonshot, GPUStack and Perplexity."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: WirePromptDetails | None = None
    completion_tokens_details: WireCompletionDetails | None = None
    prompt_cache_hit_tokens: int | None = None
    cached_tokens: int | None = None
    num_cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost: Any = None


class Answer(Struct, gc=False):
    """A whole answer, or one chunk of a stream."""

    choices: list[WireChoice] | None = None
    usage: WireUsage | None = None
    model: str | None = None
    id: str | None = None
    error: Any = None
    cost: Any = None
    service_tier: str | None = None


# gc=False throughout: what is decoded holds no cycles, and is gone before a collection would find it.
DECODER = msgspec.json.Decoder(Answer)


def message_of(message: WireMessage, address: str = "") -> Message:
    """Turn a message of the server at `address` into ours: text apart from thinking, tool calls with their own text."""
    content = message.content
    if type(content) is str and not may_think(content) and _is_plain(message):  # nearly every answer
        return Message(content=content)
    calls = _calls(message) if message.tool_calls or message.function_call else ()
    is_plain = content is None or type(content) is str
    thinks = message.reasoning_content or message.reasoning or message.reasoning_details
    other = () if is_plain and not message.audio and not message.images else other_kinds(message)
    stated = _thoughts(message) if calls and thinks else {}
    origin = address.rstrip("/") if calls and (stated or any(call.signature for call in calls)) else None
    thoughts = [reasoning_text(message)] if thinks else []
    if content is not None and not isinstance(content, str):
        content, more = text_and_thoughts(content)
        thoughts += more
    if content:
        content, thought = split_thinking(content)
        thoughts.append(thought)
    return Message(
        content=content,
        reasoning="".join(thoughts) or None,
        tool_calls=calls,
        refusal=message.refusal or None,
        other=other,
        source=msgspec.json.encode(stated) if stated else None,
        origin=origin,
    )


def _is_plain(message: WireMessage) -> bool:
    return not (
        message.tool_calls
        or message.reasoning_content
        or message.reasoning
        or message.reasoning_details
        or message.refusal
        or message.function_call
        or message.audio
        or message.images
    )


def _thoughts(message: WireMessage) -> dict[str, Any]:
    """Return the thinking that goes back with a call of a tool, under its own name: DeepSeek, Kimi, OpenRouter, GLM."""
    fields = {"reasoning_content": message.reasoning_content, "reasoning_details": message.reasoning_details}
    return {name: value for name, value in fields.items() if value}


def as_it_came(message: Mapping[str, Any], address: str, *, keeps: bool) -> Mapping[str, Any]:
    """Return a message as the server at `address` is to get it: its own answers that called tools with their thinking.

    The signatures of Gemini's calls go to Google's servers and to the one that gave them; others refuse them.
    """
    if not isinstance(message, Turn) or not message.get("tool_calls"):
        return message
    is_own = message.origin == address.rstrip("/")
    made = dict(message)
    if is_own and keeps and message.source is not None:
        made |= msgspec.json.decode(message.source)
    if not is_own and "googleapis.com" not in address:
        made["tool_calls"] = [
            {name: value for name, value in call.items() if name != "extra_content"} for call in message["tool_calls"]
        ]
    return made


def other_kinds(message: WireMessage) -> tuple[str, ...]:
    """Return the kinds of content that are neither text nor thinking: audio, images, parts of other types."""
    kinds = ["audio"] if message.audio else []
    kinds += ["image"] if message.images else []
    if isinstance(message.content, list):
        types = [str(part.get("type")) for part in message.content if isinstance(part, dict)]
        kinds += [kind for kind in types if kind not in ("text", "thinking", "reasoning", "output_text", "None")]
    return tuple(dict.fromkeys(kinds))


def text_and_thoughts(content: Any) -> tuple[str, list[str]]:
    """Read content that is no text: parts (Mistral's thinking) or an object (Cloudflare's json_schema).

    >>> text_and_thoughts([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, "4"])
    ('4', ['hm'])
    """
    if not isinstance(content, list):
        return msgspec.json.encode(content).decode(), []
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            continue
        elif part.get("type") in ("thinking", "reasoning"):
            inner = part.get("thinking") or part.get("reasoning") or part.get("text") or ""
            thoughts.append(inner if isinstance(inner, str) else text_and_thoughts(inner)[0])
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
    return "".join(texts), thoughts


def reasoning_text(message: WireMessage) -> str:
    """The thinking that stands under one of its three names."""
    stated = message.reasoning_content or message.reasoning
    if stated and isinstance(stated, str):
        return stated
    details = [detail for detail in message.reasoning_details or () if isinstance(detail, dict)]
    return "".join([text for d in details if isinstance(text := d.get("text") or d.get("summary"), str)])


def _calls(message: WireMessage) -> tuple[ToolCall, ...]:
    found = [tool_call(call) for call in message.tool_calls or () if call.function or call.custom]
    legacy = message.function_call
    if not found and legacy is not None and legacy.name:  # Snowflake always sends an empty one
        found.append(ToolCall(id="", name=legacy.name, arguments=arguments_text(legacy.arguments)))
    return tuple(found)


def tool_call(call: WireToolCall) -> ToolCall:
    """Turn a function's or a custom tool's call into ours."""
    function = call.function
    if function is not None:
        name, arguments = function.name, function.arguments
    else:
        name, arguments = (call.custom.name, call.custom.input) if call.custom else (None, None)
    text = arguments if type(arguments) is str else arguments_text(arguments)
    return ToolCall(id=call.id or "", name=name or "", arguments=text, signature=_signature(call.extra_content))


def _signature(extra: Any) -> str | None:
    google = extra.get("google") if isinstance(extra, dict) else None
    found = google.get("thought_signature") if isinstance(google, dict) else None
    return found if isinstance(found, str) else None


def arguments_text(value: Any) -> str:
    """The arguments as text, whether they came as text, as an object or not at all."""
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


def usage_of(answer: Answer) -> Usage:
    """Tokens and cost; None where the provider did not say."""
    usage = answer.usage
    if usage is None:
        return Usage(cost=usd(answer.cost))
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    cached = prompt.cached_tokens if prompt is not None else None
    reasoning = completion.reasoning_tokens if completion is not None else None
    cost = answer.cost if usage.cost is None else usage.cost
    return Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=_with_rest(usage),
        cache_write_tokens=None if prompt is None else prompt.cache_write_tokens,
        cached_tokens=other_cached_tokens(usage) if cached is None else cached,
        reasoning_tokens=usage.reasoning_tokens if reasoning is None else reasoning,
        cost=None if cost is None else usd(cost),
    )


def _with_rest(usage: WireUsage) -> int | None:
    """The output tokens, with what the total has beside input and output: thinking, as xAI counts it."""
    given, answered, total = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
    if given is None or answered is None or total is None:
        return answered
    return max(answered, total - given)


def other_cached_tokens(usage: WireUsage) -> int | None:
    """The cached tokens where DeepSeek, Moonshot and GPUStack count them."""
    if usage.prompt_cache_hit_tokens is not None:
        return usage.prompt_cache_hit_tokens
    return usage.num_cached_tokens if usage.cached_tokens is None else usage.cached_tokens


def usd(cost: Any) -> float | None:
    """USD: a number (OpenRouter) or an object with a total (Perplexity, Venice)."""
    if isinstance(cost, dict):
        cost = cost.get("total_cost", cost.get("usd"))
    return float(cost) if isinstance(cost, int | float) else None
