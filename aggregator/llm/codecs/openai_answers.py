"""Answers of chat completions, whole or streamed, decoded leniently and converted to our records.

Recorded from OpenAI, Azure, OpenRouter, Mistral, DeepSeek, Groq, Together, vLLM, llama.cpp, Ollama and others: content
null, absent, a list of parts or an object; three names for reasoning; usage with floats, nulls and objects inside. A
stream has deltas of several choices, tool calls in pieces, and usage once, several times or never.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.base import CompletingCodec, Event, EventReader
from aggregator.llm.codecs.failures import fault_in_event, fault_of
from aggregator.llm.codecs.wire import ThinkingFilter, may_think, parse, read, split_thinking, with_rest
from aggregator.llm.messages import Turn
from aggregator.records import Completion, HTTPReply, Message, ToolCall, Usage

# ---- the reply


class WireFunction(Struct, gc=False):
    """A function call of the model; `arguments` is text, or an object if a gateway parsed it."""

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
    extra_content: Any = None  # Gemini's: the signature of its thinking


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
    """The cached part of the input, and the part written to a cache (OpenRouter)."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class WireCompletionDetails(Struct, gc=False):
    """The thinking part of the output."""

    reasoning_tokens: int | None = None


_NO_PROMPT_DETAILS, _NO_COMPLETION_DETAILS = WirePromptDetails(), WireCompletionDetails()


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


# gc=False throughout: decoded objects hold no cycles, and are gone before a collection would find them.
DECODER = msgspec.json.Decoder(Answer)


# ---- reply -> message


def message_of(message: WireMessage, address: str = "") -> Message:
    """Convert a message of the server at `address` to ours.

    Text is separate from thinking, and tool calls keep their own text.
    """
    content = message.content
    called = message.tool_calls or message.function_call
    thinks = message.reasoning_content or message.reasoning or message.reasoning_details
    media = message.audio or message.images
    if type(content) is str and not (called or thinks or media or message.refusal or may_think(content)):
        return Message(content=content)  # nearly every answer
    calls = _calls(message) if called else ()
    other = () if not media and (content is None or type(content) is str) else other_kinds(message)
    refusal = message.refusal
    if "refusal" in other and not refusal:
        found = [part for part in message.content if isinstance(part, dict) and part.get("type") == "refusal"]
        refusal = "".join([str(part.get("refusal")) for part in found])
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
        refusal=refusal or None,
        other=other,
        source=msgspec.json.encode(stated) if stated else None,
        origin=origin,
    )


def _thoughts(message: WireMessage) -> dict[str, Any]:
    """Return the thinking that is sent back with a tool call, under its own name: DeepSeek, Kimi, OpenRouter, GLM."""
    fields = {"reasoning_content": message.reasoning_content, "reasoning_details": message.reasoning_details}
    return {name: value for name, value in fields.items() if value}


def as_it_came(message: Mapping[str, Any], address: str, *, keeps: bool) -> Mapping[str, Any]:
    """Return a message for the server at `address`: its own answers with tool calls keep their thinking.

    The signatures of Gemini's calls are sent to Google's servers and to their own; others refuse them.
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
    """Read content that is not text: parts (Mistral's thinking) or an object (Cloudflare's json_schema).

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
    """Return the thinking, under any of its three names."""
    stated = message.reasoning_content or message.reasoning
    if stated and isinstance(stated, str):
        return stated
    details = [detail for detail in message.reasoning_details or () if isinstance(detail, dict)]
    return "".join([text for d in details if isinstance(text := d.get("text") or d.get("summary"), str)])


def _calls(message: WireMessage) -> tuple[ToolCall, ...]:
    found = [tool_call(call) for call in message.tool_calls or () if call.function or call.custom]
    found = [call for call in found if call.name or call.arguments]  # an empty one is no call: gateways send it
    legacy = message.function_call
    if not found and legacy is not None and legacy.name:  # Snowflake always sends an empty one
        found.append(ToolCall(id="", name=legacy.name, arguments=arguments_text(legacy.arguments)))
    return tuple(found)


def tool_call(call: WireToolCall) -> ToolCall:
    """Convert a function's or a custom tool's call to ours."""
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
    """Return the arguments as text, whether they came as text, as an object or not at all."""
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()


# ---- usage


def usage_of(answer: Answer) -> Usage:
    """Return tokens and cost; None for missing values."""
    usage = answer.usage
    if usage is None:
        return Usage(cost=usd(answer.cost))
    prompt = usage.prompt_tokens_details or _NO_PROMPT_DETAILS
    reasoning = (usage.completion_tokens_details or _NO_COMPLETION_DETAILS).reasoning_tokens
    cost = answer.cost if usage.cost is None else usage.cost
    return Usage(
        input_tokens=usage.prompt_tokens,
        output_tokens=with_rest(usage.completion_tokens, usage.prompt_tokens, usage.total_tokens),
        cache_write_tokens=prompt.cache_write_tokens,
        cached_tokens=other_cached_tokens(usage) if prompt.cached_tokens is None else prompt.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens if reasoning is None else reasoning,
        cost=None if cost is None else usd(cost),
    )


def other_cached_tokens(usage: WireUsage) -> int | None:
    """Return the cached tokens in the fields of DeepSeek, Moonshot and GPUStack."""
    if usage.prompt_cache_hit_tokens is not None:
        return usage.prompt_cache_hit_tokens
    return usage.num_cached_tokens if usage.cached_tokens is None else usage.cached_tokens


def usd(cost: Any) -> float | None:
    """Return USD: a number (OpenRouter) or an object with a total (Perplexity, Venice)."""
    if isinstance(cost, dict):
        cost = cost.get("total_cost", cost.get("usd"))
    return float(cost) if type(cost) in (int, float) else None


# ---- streams


class _Growing(Struct):
    """A choice as received so far."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    reasoning_content: list[str] = field(default_factory=list)
    details: list[Any] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: list[WireToolCall] = field(default_factory=list)
    function: WireFunction | None = None
    audio: Any = None
    images: Any = None
    finish_reason: str | None = None
    in_deltas: bool = False


class ChatStream(EventReader):
    """Reads a stream of chat completion chunks; the deltas are those of the first choice, without thinking."""

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._choices: dict[int, _Growing] = {}
        self._thinking = ThinkingFilter()
        self._answer = Answer()

    def event(self, event: Event) -> str:
        """Process one chunk and return its text."""
        chunk = Answer(error=fault_in_event(event.data)) if event.name == "error" else read(event.data, DECODER)
        failed = chunk.error or next((choice.error for choice in chunk.choices or () if choice.error), None)
        if not (chunk.choices or chunk.usage or chunk.id) and fault_of(stated := parse(event.data)).message:
            failed = failed or stated  # vLLM's: no field `error`
        if failed:
            raise self.codec.fault(failed, HTTPReply(status=200, body=event.data, headers={}))
        self._answer.id = self._answer.id or chunk.id
        self._answer.model = self._answer.model or chunk.model
        self._answer.service_tier = chunk.service_tier or self._answer.service_tier
        self._answer.usage = _latest(self._answer.usage, chunk.usage)
        self._answer.cost = self._answer.cost if chunk.cost is None else chunk.cost
        return "".join([self._grow(choice) for choice in chunk.choices or ()])

    def whole(self) -> bool:
        """Return True once every choice has a finish reason, or [DONE] came, which not all servers send."""
        ended = [choice.finish_reason is not None for choice in self._choices.values()]
        return self.done or (bool(ended) and all(ended))

    def build(self, reply: HTTPReply) -> Completion:
        """Build the answer from the choices."""
        self._answer.choices = [_whole(index, choice) for index, choice in sorted(self._choices.items())]
        return self.codec.completion(self._answer, reply)

    def _grow(self, choice: WireChoice) -> str:
        index = choice.index or 0
        growing = self._choices.setdefault(index, _Growing())
        growing.finish_reason = choice.finish_reason or growing.finish_reason
        delta = choice.delta or (None if growing.in_deltas else choice.message)  # some send the whole at the end
        growing.in_deltas = growing.in_deltas or choice.delta is not None
        if delta is None:
            return self._text(index, growing, choice.text or "")
        stated = delta.reasoning_content
        thoughts = growing.reasoning_content if stated and isinstance(stated, str) else growing.reasoning
        thoughts.append(reasoning_text(delta))
        for detail in delta.reasoning_details or ():
            _grow_details(growing.details, detail)
        growing.audio, growing.images = growing.audio or delta.audio, growing.images or delta.images
        if delta.refusal:
            growing.refusal.append(delta.refusal)
        for piece in delta.tool_calls or ():
            _grow_call(growing.calls, piece)
        if delta.function_call is not None:
            growing.function = _grow_function(growing.function, delta.function_call)
        content = delta.content
        if content is not None and not isinstance(content, str):
            content, more = text_and_thoughts(content)
            growing.reasoning += more
        return self._text(index, growing, content or "")

    def _text(self, index: int, growing: _Growing, content: str) -> str:
        growing.content.append(content)
        return self._thinking.feed(content) if index == 0 and content else ""


def _latest(usage: WireUsage | None, newer: WireUsage | None) -> WireUsage | None:
    """Return the newer counts: usage may come in several chunks, each a running total."""
    if usage is None or newer is None:
        return newer or usage
    for name in WireUsage.__struct_fields__:
        value = getattr(newer, name)
        if value is not None:
            setattr(usage, name, value)
    return usage


def _grow_call(calls: list[WireToolCall], piece: WireToolCall) -> None:
    """Add a piece to its call, by index; a name with another id starts a new call.

    A piece without a name continues the last call, whatever its index; a new id without a name does not start a call.
    """
    same = [call for call in calls if piece.index is None or call.index == piece.index]
    last = same[-1] if same else None
    named = (piece.function and piece.function.name) or (piece.custom and piece.custom.name)
    if last is None and calls and not named and not piece.id:
        last = calls[-1]
    if last is None or (named and piece.id and last.id and piece.id != last.id):
        whole = tool_call(piece)
        function = WireFunction(name=whole.name, arguments=whole.arguments)
        calls.append(WireToolCall(id=piece.id, function=function, index=piece.index, extra_content=piece.extra_content))
        return
    grown = piece.function or WireFunction(
        name=piece.custom.name if piece.custom else None, arguments=piece.custom.input if piece.custom else None
    )
    last.id = last.id or piece.id
    last.extra_content = last.extra_content or piece.extra_content
    last.function = _grow_function(last.function, grown)


def _grow_details(details: list[Any], piece: Any) -> None:
    """Add a piece of OpenRouter's reasoning: texts of one index and type grow, other fields are the latest."""
    last = details[-1] if details else None
    if not (isinstance(piece, dict) and isinstance(last, dict)) or any(
        last.get(key) != piece.get(key) for key in ("type", "index")
    ):
        details.append(dict(piece) if isinstance(piece, dict) else piece)
        return
    for name, value in piece.items():
        grows = name in ("text", "summary", "data") and isinstance(value, str) and isinstance(last.get(name), str)
        if value is not None:
            last[name] = last[name] + value if grows else value


def _grow_function(function: WireFunction | None, piece: WireFunction) -> WireFunction:
    """Add a piece; a name may come in pieces too, before the arguments, or again in every piece."""
    function = function or WireFunction(arguments="")
    name, more = function.name or "", piece.name or ""
    if more.startswith(name):
        function.name = more or None
    elif not function.arguments and not name.endswith(more):
        function.name = name + more
    function.arguments = arguments_text(function.arguments) + arguments_text(piece.arguments)
    return function


def _whole(index: int, choice: _Growing) -> WireChoice:
    message = WireMessage(
        content="".join(choice.content) if any(choice.content) or not choice.calls else None,
        tool_calls=choice.calls or None,
        reasoning="".join(choice.reasoning) or None,
        reasoning_content="".join(choice.reasoning_content) or None,
        reasoning_details=choice.details or None,
        refusal="".join(choice.refusal) or None,
        function_call=choice.function,
        audio=choice.audio,
        images=choice.images,
    )
    return WireChoice(message=message, finish_reason=choice.finish_reason, index=index)
