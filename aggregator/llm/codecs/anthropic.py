"""Anthropic's Messages API: messages and tools as its blocks, whole answers and streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import ConfigError
from aggregator.llm.calls import ChatCall, RateHeaders, Target
from aggregator.llm.codecs.base import CompletingCodec, Event, EventReader, JSONCodec, words
from aggregator.llm.codecs.failures import fault_in_event
from aggregator.llm.codecs.wire import as_raw, json_object, raw_text, read
from aggregator.llm.messages import Mark, as_data
from aggregator.llm.schemas import UNENFORCED, closed
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage

_CHOICES = {"auto": "auto", "required": "any", "any": "any", "none": "none"}


# ---- messages -> request


class _Own(Struct, gc=False):
    content: list[dict[str, Any]] = []


_OWN = msgspec.json.Decoder(_Own)


def system_of(messages: Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]] | None:
    """Return the system prompt, a separate field in this API: one text unchanged, several (or parts) as blocks."""
    contents = [message.get("content") for message in messages if message["role"] in ("system", "developer")]
    if len(contents) == 1 and isinstance(contents[0], str):
        return contents[0] or None
    return [block for content in contents for block in _blocks(content)] or None


def messages_of(messages: Sequence[Mapping[str, Any]], mark: Mark | None = None) -> list[dict[str, Any]]:
    """Return the conversation; tool results of one turn are in one user message, as the API requires.

    The prefix that ends at `mark` is marked for the cache.

    >>> messages_of([{"role": "tool", "tool_call_id": "a", "content": "1"}, {"role": "tool", "tool_call_id": "b",
    ...     "content": "2"}])[0]["content"][1]
    {'type': 'tool_result', 'tool_use_id': 'b', 'content': '2'}
    """
    turns: list[dict[str, Any]] = []
    results: list[dict[str, Any]] | None = None
    for position, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer"):
            continue
        if role in ("tool", "function"):
            if results is None:
                results = []
                turns.append({"role": "user", "content": results})
            results.append(_tool_result(message))
            continue
        results = None
        if mark is not None and mark.message == position:
            turns.append({"role": role, "content": _marked(str(message["content"]), mark.length)})
        elif role == "assistant":
            turns.append({"role": "assistant", "content": _assistant(message)})
        else:
            content = message.get("content")
            turns.append({"role": "user", "content": content if isinstance(content, str) else _blocks(content)})
    return turns


def _marked(text: str, length: int) -> list[dict[str, Any]]:
    opening = {"type": "text", "text": text[:length], "cache_control": {"type": "ephemeral"}}
    return [opening, {"type": "text", "text": text[length:]}]


def _assistant(message: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    content, calls, source = message.get("content"), message.get("tool_calls"), getattr(message, "source", None)
    if isinstance(content, str) and not calls and source is None:
        return content
    blocks = _blocks(content)
    for call in calls or ():
        function = call.get("function") or {}
        arguments = json_object(function.get("arguments"))
        blocks.append({"type": "tool_use", "id": call.get("id"), "name": function.get("name"), "input": arguments})
    return blocks if source is None else _as_it_came(source, blocks)


def _as_it_came(source: bytes, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the original blocks of an answer of this API, in order: signed thinking may not be moved or left out.

    `blocks` if the message was changed, since its signatures no longer apply.
    """
    own = read(source, _OWN).content
    if _said(own) != _said(blocks):
        return blocks
    return [block for block in own if block.get("type") != "text" or block.get("text")]


def _said(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    texts = [text for block in blocks if block.get("type") == "text" and isinstance(text := block.get("text"), str)]
    calls = [(block.get("id"), block.get("input")) for block in blocks if block.get("type") == "tool_use"]
    return "".join(texts), calls


def _tool_result(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    block = {"type": "tool_result", "tool_use_id": message.get("tool_call_id") or message.get("name")}
    return {**block, "content": content if isinstance(content, str) else _blocks(content)}


def _blocks(content: Any) -> list[dict[str, Any]]:
    """Return content as blocks; an empty text is left out, because the API refuses one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_block(part) for part in content or ()]


def _block(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return one part as a block; a block of this API is returned unchanged."""
    if part["type"] != "image_url":
        return dict(part)
    url = part["image_url"]["url"]
    data = as_data(url)
    source = {"type": "base64", "media_type": data[0], "data": data[1]} if data else {"type": "url", "url": url}
    return {"type": "image", "source": source} | ({"cache_control": c} if (c := part.get("cache_control")) else {})


def tool_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a function as this API's tool; a built-in tool of the provider is returned unchanged."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return tool
    named = {"name": function.get("name"), "description": function.get("description")}
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {**{name: value for name, value in named.items() if value is not None}, "input_schema": schema}


def tool_choice_of(choice: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return OpenAI's `tool_choice` for this API; one in its format is returned unchanged.

    >>> tool_choice_of("required")
    {'type': 'any'}
    """
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise ConfigError(f"Expected tool_choice of auto, required, none or a function, got {choice!r}")
        return {"type": _CHOICES[choice]}
    function = choice.get("function")
    return {"type": "tool", "name": function.get("name")} if isinstance(function, Mapping) else choice


# ---- reply -> completion


class Block(Struct, gc=False):
    """One block of content; unknown kinds (search results, compaction, ...) are skipped."""

    type: Any = None  # Any: an unknown block may hold anything, and must not invalidate the others
    text: Any = None
    thinking: Any = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()


class _Details(Struct, gc=False):
    thinking_tokens: int | None = None


class _Written(Struct, gc=False):
    ephemeral_1h_input_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """`input_tokens` excludes cached tokens; the two others are added to it."""

    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: _Details | None = None
    cache_creation: _Written | None = None
    service_tier: str | None = None


class Answer(Struct, gc=False):
    """A message, or its part that has been streamed so far."""

    model: str | None = None
    id: str | None = None
    content: list[Block] | str | None = None
    stop_reason: str | None = None
    usage: WireUsage | None = None
    error: Any = None


# ---- streams


class _Built(Answer, gc=False):
    """A streamed answer, with the JSON from which its content was read."""

    body: bytes = b""


# Fields are in the order in which the API sends them: msgspec tries the next one first.
DECODER = msgspec.json.Decoder(Answer)
SAID_NOTHING = WireUsage()


class _Delta(Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    content: str | None = None  # of a compaction
    citation: dict[str, Any] | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Event(Struct, gc=False):
    type: str | None = None
    message: Answer | None = None
    index: int | None = None
    content_block: dict[str, Any] | None = None
    delta: _Delta | None = None
    usage: WireUsage | None = None
    error: Any = None


_EVENT_DECODER = msgspec.json.Decoder(_Event)
_GROWING = ("text", "thinking", "signature", "content")


class MessageStream(EventReader):
    """Reads a stream of message events; the deltas are those of the text blocks."""

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._answer = Answer()
        self._blocks: dict[int, dict[str, Any]] = {}
        self._inputs: dict[int, str] = {}
        self._ended = False

    def event(self, event: Event) -> str:
        """Process one event and return its text."""
        found = _Event(error=fault_in_event(event.data)) if event.name == "error" else read(event.data, _EVENT_DECODER)
        if found.error:
            raise self.codec.fault(found.error, HTTPReply(status=200, body=event.data, headers={}))
        if found.message is not None:
            self._answer = found.message
        if found.usage is not None:
            self._add_usage(found.usage)
        if found.type == "content_block_start" and found.content_block is not None:
            block = self._blocks[found.index or 0] = found.content_block
            return _text(block, "text") if block.get("type") == "text" else ""
        if found.type == "message_stop":
            self._ended = True
        return self._grow(found.index or 0, found.delta) if found.delta is not None else ""

    def whole(self) -> bool:
        """Return True once the message has a stop reason, or its end was sent."""
        return self._ended or self._answer.stop_reason is not None

    def build(self, reply: HTTPReply) -> Completion:
        """Join the blocks, as in an answer in one piece."""
        for index, text in self._inputs.items():  # the block began with {}; its pieces came after
            self._blocks[index]["input"] = as_raw(text)
        body = msgspec.json.encode({"content": [block for _, block in sorted(self._blocks.items())]})
        content = read(body, DECODER).content
        begun = self._answer
        whole = _Built(begun.model, begun.id, content, begun.stop_reason, begun.usage, body=body)
        return self.codec.completion(whole, reply)

    def _grow(self, index: int, delta: _Delta) -> str:
        if delta.stop_reason is not None:
            self._answer.stop_reason = delta.stop_reason
        pieces = {name: piece for name in _GROWING if (piece := getattr(delta, name))}
        if not pieces and not delta.partial_json and not delta.citation:
            return ""
        block = self._blocks.setdefault(index, {"type": "thinking" if delta.thinking else "text"})
        for name, piece in pieces.items():
            block[name] = _text(block, name) + piece
        if delta.partial_json:
            self._inputs[index] = self._inputs.get(index, "") + delta.partial_json
        if delta.citation:
            block["citations"] = [*(block.get("citations") or ()), delta.citation]
        return delta.text or ""

    def _add_usage(self, newer: WireUsage) -> None:
        """Merge the newer counts: usage comes at the start and at the end, each a running total."""
        usage = self._answer.usage = self._answer.usage or WireUsage()
        for name in WireUsage.__struct_fields__:
            value = getattr(newer, name)
            if value is not None:
                setattr(usage, name, value)


def _text(block: dict[str, Any], name: str) -> str:
    text = block.get(name)
    return text if isinstance(text, str) else ""


VERSION = "2023-06-01"  # every recorded request names it
MAX_TOKENS = 4096  # the API requires a number


_LEFT = "anthropic-ratelimit-{}-remaining", "anthropic-ratelimit-{}-limit", "anthropic-ratelimit-{}-reset"


# ---- the codec


class AnthropicMessages(JSONCodec[Answer]):
    """The codec of the Messages API, bound to one server."""

    decoder = DECODER
    reader = MessageStream
    finish_words = words(
        stop="end_turn stop_sequence stop",
        length="max_tokens model_context_window_exceeded pause_turn length",  # a paused turn is to be continued
        tool_calls="tool_use tool_calls",
        content_filter="refusal content_filter",
    )
    requests = (RateHeaders(*[name.format("requests") for name in _LEFT]),)
    tokens = (RateHeaders(*[name.format("tokens") for name in _LEFT]),)
    lacks = frozenset({"n", "seed"})
    count_fields = ()
    marks = ""
    kept_headers = ("anthropic-version", "anthropic-beta", "anthropic-ratelimit-*")

    def __init__(self, target: Target) -> None:
        super().__init__(replace(target, headers={"anthropic-version": VERSION, **target.headers}))
        self._url = f"{target.base_url.rstrip('/').removesuffix('/v1')}/v1/messages"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; raises ConfigError for several answers or a seed, which this API lacks."""
        for name, value in (("n", call.n if call.n != 1 else None), ("seed", call.seed)):
            if value is not None:
                raise ConfigError(f"Expected no {name} for anthropic, whose API has none, got {name}={value!r}")
        stop = [call.stop] if isinstance(call.stop, str) else call.stop
        fields = {
            "model": call.model,
            "max_tokens": MAX_TOKENS + _thinking_budget(call) if call.max_tokens is None else call.max_tokens,
            "system": system_of(call.messages),
            "messages": messages_of(call.messages, self.mark(call)),
            "temperature": call.temperature,
            "top_p": call.top_p,
            "stop_sequences": stop,
            "tools": None if call.tools is None else [tool_of(tool) for tool in call.tools],
            "tool_choice": None if call.tool_choice is None else tool_choice_of(call.tool_choice),
            "output_config": _output_config(call),
            "stream": call.stream or None,
        }
        body = {name: value for name, value in fields.items() if value is not None}
        return self.post(self._url, {**body, **call.extra}, call)

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Turn a parsed message into a Completion."""
        content = reasoning = source = None
        calls: list[ToolCall] = []
        other: dict[str, None] = {}
        for block in self._content(answer, reply):
            if block.type == "text" and isinstance(block.text, str):
                content = (content or "") + block.text
            elif block.type == "tool_use":
                calls.append(ToolCall(id=block.id or "", name=block.name or "", arguments=raw_text(block.input)))
            elif block.type != "text":
                source = answer.body if isinstance(answer, _Built) else reply.body
                if block.type == "thinking" and isinstance(block.thinking, str):
                    reasoning = (reasoning or "") + block.thinking
                elif block.type not in ("thinking", "redacted_thinking"):
                    other[str(block.type)] = None
        choice = Choice(
            message=Message(
                content=content,
                reasoning=reasoning,
                tool_calls=tuple(calls),
                refusal="the answer was stopped" if answer.stop_reason == "refusal" else None,
                source=source,
                other=tuple(other),
            ),
            finish_reason=self.finish_reason(answer.stop_reason),
            raw_finish_reason=answer.stop_reason,
        )
        usage = _usage(answer.usage or SAID_NOTHING)
        tier = None if answer.usage is None else answer.usage.service_tier
        return self.completed(reply, [choice], usage=usage, model=answer.model, answer_id=answer.id, service_tier=tier)

    def _content(self, answer: Answer, reply: HTTPReply) -> list[Block]:
        """Return the blocks; raises for an error, or without content. An empty list is an empty answer."""
        if answer.error:
            raise self.fault(answer.error, reply)
        if isinstance(answer.content, str):  # from a gateway
            return [Block(type="text", text=answer.content)]
        if answer.content is None:
            raise self.empty("content", reply)
        return answer.content


def _usage(usage: WireUsage) -> Usage:
    given, cached, written = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    details = usage.output_tokens_details
    return Usage(
        input_tokens=None if given is None else given + max(cached or 0, 0) + max(written or 0, 0),
        output_tokens=usage.output_tokens,
        cached_tokens=cached,
        reasoning_tokens=None if details is None else details.thinking_tokens,
        cache_write_tokens=written,
        cache_write_1h_tokens=None if usage.cache_creation is None else usage.cache_creation.ephemeral_1h_input_tokens,
    )


def _thinking_budget(call: ChatCall) -> int:
    """Return the thinking tokens in `extra`, which count in the limit of the answer."""
    thinking = call.extra.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return budget if isinstance(budget, int) else 0


def _output_config(call: ChatCall) -> dict[str, Any] | None:
    """Return the schema of the answer; this API has no plain JSON mode."""
    wanted = call.response_format or {}
    if wanted.get("type") != "json_schema":
        return None
    stated = wanted.get("json_schema") or {}
    return {"format": {"type": "json_schema", "schema": closed(stated.get("schema", {}), UNENFORCED)}}
