"""Anthropic's Messages: our calls to its blocks, its blocks to our answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import APIStatusError, ConfigError, DecodeError, EmptyResponseError
from aggregator.llm.calls import ChatCall, Codec, StreamReader, Target
from aggregator.llm.codecs.anthropic_messages import messages_of, system_of, tool_choice_of, tool_of
from aggregator.llm.codecs.failures import fault_in_event, fault_inside, request_id, status_error
from aggregator.llm.codecs.sse import Event, EventReader, read_other
from aggregator.llm.codecs.wire import REASONS, REFUSED, Envelope, excerpt, read, secrets
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage


class Block(Struct, gc=False):
    """One block of content; kinds that are not known (search results, compaction, ...) are read over."""

    type: Any = None  # Any: a block that is none of ours may hold anything, and must not cost us the others
    text: Any = None
    thinking: Any = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()


class _Details(Struct, gc=False):
    thinking_tokens: int | None = None


class WireUsage(Struct, gc=False):
    """`input_tokens` counts what no cache held: the two others come on top."""

    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: _Details | None = None


class Answer(Struct, gc=False):
    """A message, or what is known of one while it streams."""

    model: str | None = None
    id: str | None = None
    content: list[Block] | str | None = None
    stop_reason: str | None = None
    usage: WireUsage | None = None
    error: Any = None


# Fields stand in the order in which the API sends them: msgspec looks for the next one first.
DECODER = msgspec.json.Decoder(Answer)
SAID_NOTHING = WireUsage()


def arguments(block: Block) -> str:
    """The tool's input as it stands in the body."""
    text = str(block.input, "utf-8")
    if text.startswith('"'):  # a gateway that speaks OpenAI's format behind; a stream that was cut
        return str(msgspec.json.decode(text))
    return "{}" if text in ("", "null") else text


VERSION = "2023-06-01"  # every recorded request names it
MAX_TOKENS = 4096  # the API demands a number
_decode = DECODER.decode


class AnthropicMessages:
    """The codec of the Messages API, bound to one server."""

    def __init__(self, target: Target) -> None:
        self.target = replace(target, headers={"anthropic-version": VERSION, **target.headers})
        self._envelope = Envelope(self.target)
        self._url = f"{target.base_url.rstrip('/').removesuffix('/v1')}/v1/messages"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; raises ConfigError for several answers or a seed, which this API has not."""
        for name, value in (("n", call.n if call.n != 1 else None), ("seed", call.seed)):
            if value is not None:
                raise ConfigError(f"Expected no {name} for anthropic, whose API has none, got {name}={value!r}")
        stop = [call.stop] if isinstance(call.stop, str) else call.stop
        fields = {
            "model": call.model,
            "max_tokens": MAX_TOKENS if call.max_tokens is None else call.max_tokens,
            "system": system_of(call.messages),
            "messages": messages_of(call.messages),
            "temperature": call.temperature,
            "top_p": call.top_p,
            "stop_sequences": stop,
            "tools": None if call.tools is None else [tool_of(tool) for tool in call.tools],
            "tool_choice": None if call.tool_choice is None else tool_choice_of(call.tool_choice),
            "output_config": _output_config(call),
            "stream": call.stream or None,
        }
        body = {name: value for name, value in fields.items() if value is not None}
        return self._envelope.post(self._url, {**body, **call.extra}, stream=call.stream)

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read a message; raises LLMError where there is none."""
        try:
            answer = _decode(reply.body)
        except REFUSED:
            try:
                answer = read(reply.body, DECODER)
            except DecodeError as error:
                return read_other(error, reply, self.stream(call))
        return self.completion(answer, reply, reply.body)

    def completion(self, answer: Answer, reply: HTTPReply, body: bytes) -> Completion:
        """Turn a parsed message into a Completion; `body` is the JSON that its content was read from.

        One long function: every answer takes it, and each call of a further one would cost 2 % of the whole.
        """
        blocks = answer.content
        if answer.error or type(blocks) is not list:
            blocks = self._other_content(answer, reply)
        content = reasoning = source = None
        calls: tuple[ToolCall, ...] = ()
        for block in blocks:
            kind = block.type
            if kind == "text":
                if isinstance(text := block.text, str):
                    content = text if content is None else content + text
            elif kind == "tool_use":
                calls += (ToolCall(id=block.id or "", name=block.name or "", arguments=arguments(block)),)
            else:
                source = body
                if kind == "thinking" and isinstance(thought := block.thinking, str):
                    reasoning = thought if reasoning is None else reasoning + thought
        reason, usage, headers = answer.stop_reason, answer.usage or SAID_NOTHING, reply.headers
        given, cached, written = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        details = usage.output_tokens_details
        return Completion(
            choices=(
                Choice(
                    message=Message(content=content, reasoning=reasoning, tool_calls=calls, source=source),
                    finish_reason=REASONS.get(reason, "stop"),
                    raw_finish_reason=reason,
                ),
            ),
            usage=Usage(
                input_tokens=None if given is None else given + (cached or 0) + (written or 0),
                output_tokens=usage.output_tokens,
                cached_tokens=cached,
                reasoning_tokens=None if details is None else details.thinking_tokens,
            ),
            model=answer.model or "",
            id=answer.id or "",
            request_id=headers["request-id"] if "request-id" in headers else request_id(headers),
            milliseconds=reply.milliseconds,
            replayed=reply.replayed,
            raw=reply.body,
        )

    def _other_content(self, answer: Answer, reply: HTTPReply) -> list[Block]:
        """The content of a gateway that answers with a text; raises where there is an error, or no content at all.

        A list without blocks is an empty answer, not an error.
        """
        if answer.error:
            raise fault_inside(answer.error, reply, self.target.provider, secrets(self.target))
        if isinstance(answer.content, str):
            return [Block(type="text", text=answer.content)]
        raise EmptyResponseError(
            f"Expected content from {self.target.provider}, got none in {excerpt(reply.body)}",
            status=reply.status,
            request_id=request_id(reply.headers),
        )

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of an error status."""
        return status_error(reply, self.target.provider, secrets(self.target))

    def stream(self, call: ChatCall) -> StreamReader:
        """Return a reader for a streamed answer."""
        return MessageStream(self, call, self.completion)


def _output_config(call: ChatCall) -> dict[str, Any] | None:
    """The schema that the answer must keep to; plain JSON without one is not offered here."""
    wanted = call.response_format or {}
    if wanted.get("type") != "json_schema":
        return None
    stated = wanted.get("json_schema") or {}
    return {"format": {"type": "json_schema", "schema": stated.get("schema", {})}}


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
    """Reads a stream of message events; the deltas are those of the text blocks.

    `complete` turns the answer put together and its content as JSON into a Completion, and raises an error inside it.
    """

    def __init__(
        self, codec: Codec, call: ChatCall, complete: Callable[[Answer, HTTPReply, bytes], Completion]
    ) -> None:
        super().__init__(codec, call)
        self._complete = complete
        self._answer = Answer()
        self._blocks: dict[int, dict[str, Any]] = {}
        self._inputs: dict[int, str] = {}
        self._ended = False

    def event(self, event: Event) -> str:
        """Take one event and return the text it brings."""
        told = _Event(error=fault_in_event(event.data)) if event.name == "error" else read(event.data, _EVENT_DECODER)
        if told.error:
            self._complete(Answer(error=told.error), HTTPReply(status=200, body=event.data, headers={}), b"")
        if told.message is not None:
            self._answer = told.message
        if told.usage is not None:
            self._add_usage(told.usage)
        if told.type == "content_block_start" and told.content_block is not None:
            block = self._blocks[told.index or 0] = told.content_block
            return _text(block, "text") if block.get("type") == "text" else ""
        if told.type == "message_stop":
            self._ended = True
        return self._grow(told.index or 0, told.delta) if told.delta is not None else ""

    def whole(self) -> bool:
        """The message said why it ended, or that it did."""
        return self._ended or self._answer.stop_reason is not None

    def build(self, reply: HTTPReply) -> Completion:
        """Put the blocks together, as they would have come in one piece."""
        for index, text in self._inputs.items():  # the block began with {}; its pieces came after
            self._blocks[index]["input"] = _input(text)
        body = msgspec.json.encode({"content": [block for _, block in sorted(self._blocks.items())]})
        self._answer.content = read(body, DECODER).content
        return self._complete(self._answer, reply, body)

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
        """Usage comes at the start and at the end, each a sum so far: the last number said counts."""
        usage = self._answer.usage = self._answer.usage or WireUsage()
        for name in WireUsage.__struct_fields__:
            value = getattr(newer, name)
            if value is not None:
                setattr(usage, name, value)


def _text(block: dict[str, Any], name: str) -> str:
    text = block.get(name)
    return text if isinstance(text, str) else ""


def _input(text: str) -> msgspec.Raw | str:
    """A tool's input as the model wrote it; one that was cut is kept as a text, since it is no JSON."""
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return msgspec.Raw(text.encode())
