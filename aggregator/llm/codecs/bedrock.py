"""Amazon Bedrock's Converse API with a bearer key (AWS_BEARER_TOKEN_BEDROCK), whole answers and streams.

Requests signed with AWS credentials are not supported. A stream is a sequence of binary frames, each an event of JSON
or an exception: its length and that of its headers, their checksum, the headers, the payload, and a checksum of all;
see the specification of application/vnd.amazon.eventstream.
"""

from __future__ import annotations

import struct
from binascii import crc32
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import APIConnectionError, APIStatusError, ConfigError, DecodeError, LLMError
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.base import CompletingCodec, Event, EventReader, JSONCodec, words
from aggregator.llm.codecs.wire import as_raw, excerpt, json_object, raw_text, read, with_rest
from aggregator.llm.messages import Mark, as_data
from aggregator.llm.schemas import UNENFORCED, closed
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage

_CHOICES = {"auto": "auto", "required": "any", "any": "any"}
_CACHE_POINT: dict[str, Any] = {"cachePoint": {"type": "default"}}


# ---- messages -> request


class _OwnMessage(Struct, frozen=True, gc=False):
    content: list[dict[str, Any]] = []


class _OwnOutput(Struct, frozen=True, gc=False):
    message: _OwnMessage = _OwnMessage()


class _Own(Struct, gc=False):
    output: _OwnOutput = _OwnOutput()


_OWN = msgspec.json.Decoder(_Own)


def system_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the system prompt as blocks; None if there is none."""
    system = [message for message in messages if message["role"] in ("system", "developer")]
    return [block for message in system for block in _blocks(message.get("content"), "$.system")] or None


def messages_of(messages: Sequence[Mapping[str, Any]], mark: Mark | None = None) -> list[dict[str, Any]]:
    """Return the conversation. Consecutive turns of one role are merged, because this API requires alternating roles.

    The prefix that ends at `mark` is followed by a cache point.

    >>> messages_of([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    [{'role': 'user', 'content': [{'text': 'a'}, {'text': 'b'}]}]
    """
    turns: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        where = f"$.messages[{position}]"
        role = message["role"]
        if role in ("system", "developer"):
            continue
        if mark is not None and mark.message == position:
            text = str(message["content"])
            blocks = [{"text": text[: mark.length]}, _CACHE_POINT, {"text": text[mark.length :]}]
        elif role in ("tool", "function"):
            role, blocks = "user", [_tool_result(message, where)]
        elif role == "assistant":
            blocks = _assistant(message, where)
        else:
            role, blocks = "user", _blocks(message.get("content"), where)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return turns


def _assistant(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    blocks = _blocks(message.get("content"), where)
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        arguments = json_object(function.get("arguments"))
        blocks.append({"toolUse": {"toolUseId": call.get("id"), "name": function.get("name"), "input": arguments}})
    source = getattr(message, "source", None)
    if source is None:
        return blocks
    own = read(source, _OWN).output.message.content
    return own if _said(own) == _said(blocks) else blocks  # signed thinking does not match a changed message


def _said(blocks: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """Return the text and the calls of blocks."""
    texts = [text for block in blocks if isinstance(text := block.get("text"), str)]
    uses = [use for block in blocks if isinstance(use := block.get("toolUse"), Mapping)]
    return "".join(texts), [(use.get("toolUseId"), use.get("input")) for use in uses]


def _tool_result(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    call_id = message.get("tool_call_id") or message.get("name")
    content = _blocks(message.get("content"), where) or [{"text": " "}]  # an empty result is refused
    return {"toolResult": {"toolUseId": call_id, "content": content}}


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    """Return content as blocks. A blank text is left out, because the API refuses one; cache marks become blocks."""
    blocks: list[dict[str, Any]] = []
    parts: Sequence[Mapping[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts or ():
        kind = part["type"]
        if kind == "text":
            blocks += [{"text": part["text"]}] if part.get("text", "").strip() else []
        elif kind == "image_url":
            blocks.append({"image": _image(part["image_url"]["url"], where)})
        elif kind in part:
            blocks.append({kind: part[kind]})  # a block of this API: document, video, guardContent, cachePoint
        else:
            raise ConfigError(
                f"Expected a part of type text or image_url, or a block of Converse as {{'type': {kind!r}, {kind!r}: "
                f"{{…}}}}, got {part!r} - at {where}"
            )
        if blocks and part.get("cache_control"):
            blocks.append(_CACHE_POINT)
    return blocks


def _image(url: str, where: str) -> dict[str, Any]:
    data = as_data(url)
    if data is None:
        raise ConfigError(f"Expected an image as bytes, since Bedrock fetches no address, got {url!r} - at {where}")
    kind = data[0].rpartition("/")[2].replace("jpg", "jpeg")
    return {"format": kind, "source": {"bytes": data[1]}}


def tool_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a function as this API's tool; a tool in its format is returned unchanged.

    >>> tool_of({"type": "function", "function": {"name": "f"}})
    {'toolSpec': {'name': 'f', 'inputSchema': {'json': {'type': 'object', 'properties': {}}}}}
    """
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return tool
    named = {name: value for name in ("name", "description") if (value := function.get(name)) is not None}
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {"toolSpec": {**named, "inputSchema": {"json": schema}}}


def tool_choice_of(choice: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return OpenAI's `tool_choice` for this API; one in its format is returned unchanged.

    >>> tool_choice_of("required")
    {'any': {}}
    """
    if isinstance(choice, str):
        if choice not in _CHOICES:
            raise ConfigError(f"Expected tool_choice of auto, required or a function for bedrock, got {choice!r}")
        return {_CHOICES[choice]: {}}
    function = choice.get("function")
    return {"tool": {"name": function.get("name")}} if isinstance(function, Mapping) else choice


def output_config_of(wanted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the schema of the answer as a text, which this API requires; None for any other format."""
    if wanted is None or wanted.get("type") != "json_schema":
        return None
    stated = wanted.get("json_schema") or {}
    text = msgspec.json.encode(closed(stated.get("schema", {}), UNENFORCED)).decode()
    schema = {"name": stated.get("name", "answer"), "schema": text}
    return {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": schema}}}


_PRELUDE = 12
_CHECKSUM = 4
_LARGEST = 1 << 24  # AWS's own limit
_TEXT, _BYTES = 7, 6  # the types of header values that have their own length
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # those of all others


# ---- failures and AWS event frames


class Fault(Struct, rename={"kind": "__type"}):
    """An AWS error: in the body of an error status, or in a frame."""

    message: str | None = None
    Message: str | None = None
    kind: str | None = None

    @property
    def words(self) -> str:
        """The message under either name."""
        return self.message or self.Message or ""


_FAULT = msgspec.json.Decoder(Fault)


def read_fault(body: bytes) -> Fault:
    """Read an AWS error; its fields are empty for anything else.

    >>> read_fault(b'{"Message": "no"}').words
    'no'
    """
    try:
        return read(body, _FAULT)
    except DecodeError:
        return Fault()


def is_framed(body: bytes | bytearray) -> bool:
    """Return True if a body begins with a frame."""
    return len(body) >= _PRELUDE and crc32(body[:8]) == int.from_bytes(body[8:12], "big")


class FrameParser:
    """Splits bytes into frames, each an event by its `:event-type`; an exception is an event named `error`.

    Bytes that do not begin with a frame are an answer of another kind and give no events.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._is_begun = self._is_other = False

    def feed(self, data: bytes) -> list[Event]:
        """Feed the next bytes, cut anywhere, and return the events they complete; raises DecodeError for damage."""
        self._rest += data
        found: list[Event] = []
        while not self._is_other and len(self._rest) >= _PRELUDE:
            if not is_framed(self._rest[:_PRELUDE]):
                self._refuse()
                break
            self._is_begun = True
            length, header_length, _ = struct.unpack_from("!III", self._rest)
            if not _PRELUDE + header_length + _CHECKSUM <= length <= _LARGEST:
                self._refuse()
            if len(self._rest) < length:
                break
            frame = bytes(self._rest[:length])
            del self._rest[:length]
            if crc32(frame[:-_CHECKSUM]) != int.from_bytes(frame[-_CHECKSUM:], "big"):
                self._refuse()
            payload = _PRELUDE + header_length
            found.append(_event(_headers(frame[_PRELUDE:payload]), frame[payload:-_CHECKSUM]))
        return found

    def flush(self) -> list[Event]:
        """Return no event, because half a frame is not one."""
        return []

    def _refuse(self) -> None:
        if self._is_begun:
            raise DecodeError(f"Expected a frame of AWS's event stream, got {excerpt(bytes(self._rest[:40]))}")
        self._is_other = True


def _event(headers: dict[str, str], payload: bytes) -> Event:
    """Return the event of a frame; the type of an exception becomes its code."""
    kind = headers.get(":exception-type") or headers.get(":error-code")
    if kind is None:
        return Event(headers.get(":event-type", ""), payload)
    words = read_fault(payload).words or headers.get(":error-message") or kind
    return Event("error", msgspec.json.encode({"error": {"code": kind, "message": words}}))


def _headers(data: bytes) -> dict[str, str]:
    """Return the headers with text values."""
    found: dict[str, str] = {}
    position = 0
    try:
        while position < len(data):
            start, position = position + 1, position + 1 + data[position]
            name, kind = data[start:position].decode(errors="replace"), data[position]
            position += 1
            if kind in (_TEXT, _BYTES):
                (size,) = struct.unpack_from("!H", data, position)
                position += 2
            else:
                size = _SIZES[kind]
            if kind == _TEXT:
                found[name] = data[position : position + size].decode(errors="replace")
            position += size
    except (LookupError, struct.error):
        raise DecodeError(f"Expected the headers of a frame of AWS's event stream, got {excerpt(data[:40])}") from None
    return found


# ---- reply -> completion


class _ToolUse(Struct, gc=False, rename="camel"):
    tool_use_id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()


class Block(Struct, gc=False, rename="camel"):
    """One block of content; unknown kinds are skipped."""

    text: Any = None
    tool_use: _ToolUse | None = None
    reasoning_content: Any = None
    citations_content: Any = None
    image: msgspec.Raw = msgspec.Raw()
    video: msgspec.Raw = msgspec.Raw()
    audio: msgspec.Raw = msgspec.Raw()


class _Message(Struct, gc=False):
    content: list[Block] | None = None


class _Output(Struct, gc=False):
    message: _Message | None = None


class WireUsage(Struct, gc=False, rename="camel"):
    """`inputTokens` excludes cached tokens; the two others are added to it."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_write_input_tokens: int | None = None


class Answer(Struct, gc=False, rename="camel"):
    """An answer of Converse; `body` is the JSON of its output if that is not the reply's own."""

    output: _Output | None = None
    stop_reason: str | None = None
    usage: WireUsage | None = None
    body: msgspec.UnsetType | bytes | None = None


DECODER = msgspec.json.Decoder(Answer)


class _Delta(Struct, gc=False, rename="camel"):
    text: str | None = None
    tool_use: _ToolUse | None = None
    reasoning_content: Any = None


class _Start(Struct, gc=False, rename="camel"):
    tool_use: _ToolUse | None = None


class _Event(Struct, gc=False, rename="camel"):
    content_block_index: int | None = None
    start: _Start | None = None
    delta: _Delta | None = None
    stop_reason: str | None = None
    usage: WireUsage | None = None
    error: Any = None


_EVENT_DECODER = msgspec.json.Decoder(_Event)


# ---- streams


class ConverseStream(EventReader):
    """Reads the frames of a streamed answer; the deltas are those of the text blocks."""

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._parser = FrameParser()  # type: ignore[assignment]
        self._answer = Answer()
        self._blocks: dict[int, dict[str, Any]] = {}

    def event(self, event: Event) -> str:
        """Process one event and return its text."""
        found = read(event.data, _EVENT_DECODER)
        if found.error:
            raise self.codec.fault(found.error, HTTPReply(status=200, body=event.data, headers={}))
        self._answer.stop_reason = found.stop_reason or self._answer.stop_reason
        self._answer.usage = found.usage or self._answer.usage
        index = found.content_block_index or 0
        if found.start is not None and (use := found.start.tool_use) is not None:
            self._blocks[index] = {"toolUse": {"toolUseId": use.tool_use_id, "name": use.name, "input": ""}}
        return "" if found.delta is None else self._grow(index, found.delta)

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer; raises APIConnectionError if the stream was cut."""
        if not self._events and is_framed(reply.body):
            raise APIConnectionError("Expected a stream of frames, got its end within the first", status=reply.status)
        return super().finish(reply)

    def whole(self) -> bool:
        """Return True once the answer has a stop reason."""
        return self._answer.stop_reason is not None

    def build(self, reply: HTTPReply) -> Completion:
        """Join the blocks, as in an answer in one piece."""
        for block in self._blocks.values():
            if (use := block.get("toolUse")) is not None:
                use["input"] = as_raw(use["input"] or "{}")
        content = [block for _, block in sorted(self._blocks.items())]
        body = msgspec.json.encode({"output": {"message": {"role": "assistant", "content": content}}})
        self._answer.output = read(body, DECODER).output
        self._answer.body = body
        return self.codec.completion(self._answer, reply)

    def _grow(self, index: int, delta: _Delta) -> str:
        block = self._blocks.setdefault(index, {})
        if delta.text is not None:
            block["text"] = block.get("text", "") + delta.text
        if delta.tool_use is not None:
            use = block.setdefault("toolUse", {"toolUseId": None, "name": None, "input": ""})
            use["input"] += raw_text(delta.tool_use.input) if bytes(delta.tool_use.input) else ""
        if isinstance(piece := delta.reasoning_content, dict):
            thought = block.setdefault("reasoningContent", {})
            if isinstance(hidden := piece.get("redactedContent"), str):
                thought["redactedContent"] = thought.get("redactedContent", "") + hidden
            for name in ("text", "signature"):
                if isinstance(part := piece.get(name), str):
                    inner = thought.setdefault("reasoningText", {})
                    inner[name] = inner.get(name, "") + part
        return delta.text or ""


_OTHER = ("image", "video", "audio")
_STATUSES = {
    "validationexception": 400,
    "accessdeniedexception": 403,
    "resourcenotfoundexception": 404,
    "throttlingexception": 429,
    "modelnotreadyexception": 429,
    "internalserverexception": 500,
    "serviceunavailableexception": 503,
    "modelerrorexception": 503,
    "modelstreamerrorexception": 503,
    "modeltimeoutexception": 504,
}


# ---- the codec


class BedrockConverse(JSONCodec[Answer]):
    """The codec of Converse, bound to one region; the model is an id, an inference profile or its ARN."""

    decoder = DECODER
    reader = ConverseStream
    finish_words = words(
        stop="end_turn stop_sequence",
        length="max_tokens model_context_window_exceeded",
        tool_calls="tool_use",
        content_filter="content_filtered guardrail_intervened",
    )
    lacks = frozenset({"n", "seed"})
    limit_fields = ("inferenceConfig.maxTokens",)
    count_fields = ()
    marks = r"anthropic\.|amazon\.nova"

    def encode(self, call: ChatCall) -> HTTPRequest:
        """Return the request; raises ConfigError for an image by address and for options that this API lacks."""
        self.refuse_lacking(call)
        config = {
            "maxTokens": call.max_tokens,
            "temperature": call.temperature,
            "topP": call.top_p,
            "stopSequences": [call.stop] if isinstance(call.stop, str) else call.stop,
        }
        tools = None if call.tools is None else {"tools": [tool_of(tool) for tool in call.tools]}
        if tools is not None and call.tool_choice is not None:
            tools["toolChoice"] = tool_choice_of(call.tool_choice)  # type: ignore[assignment]
        fields = {
            "messages": messages_of(call.messages, self.mark(call)),
            "system": system_of(call.messages),
            "inferenceConfig": {name: value for name, value in config.items() if value is not None} or None,
            "toolConfig": tools,
            "outputConfig": output_config_of(call.response_format),
        }
        body = {name: value for name, value in fields.items() if value is not None}
        kind = "converse-stream" if call.stream else "converse"
        url = f"{self.target.base_url.rstrip('/')}/model/{quote(call.model, safe='')}/{kind}"
        return self.post(url, {**body, **call.extra}, call)

    def decode(self, reply: HTTPReply, call: ChatCall) -> Completion:
        """Read an answer, also a stream that came in one piece; raises LLMError without one."""
        if not is_framed(reply.body):
            return super().decode(reply, call)
        reader = self.stream(call)
        reader.feed(reply.body)
        return reader.finish(reply)

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Convert a parsed answer to a Completion; raises if it is an error or has no content."""
        message = answer.output.message if answer.output is not None else None
        if message is None or message.content is None:
            raise self.empty("content", reply)
        content = reasoning = source = None
        calls: list[ToolCall] = []
        for block in message.content:
            if isinstance(text := block.text, str) or (text := _cited(block.citations_content)):
                content = (content or "") + text
            elif (use := block.tool_use) is not None:
                calls.append(ToolCall(id=use.tool_use_id or "", name=use.name or "", arguments=raw_text(use.input)))
            else:
                source = answer.body or reply.body
                reasoning = (reasoning or "") + _thought(block.reasoning_content) or reasoning
        choice = Choice(
            message=Message(
                content=content,
                reasoning=reasoning,
                tool_calls=tuple(calls),
                source=source,
                other=tuple([kind for kind in _OTHER if any(bytes(getattr(block, kind)) for block in message.content)]),
            ),
            finish_reason=self.finish_reason(answer.stop_reason),
            raw_finish_reason=answer.stop_reason,
        )
        return self.completed(reply, [choice], usage=_usage(answer.usage or WireUsage()))

    def error(self, reply: HTTPReply) -> APIStatusError:
        """Return the error of an error status, by the type that AWS names in a header or in the body."""
        found = read_fault(reply.body)
        if not found.words:
            return super().error(reply)
        kind = reply.headers.get("x-amzn-errortype", "").partition(":")[0] or found.kind
        body = msgspec.json.encode({"error": {"message": found.words, "code": kind}})
        return super().error(replace(reply, body=body))

    def fault(self, data: Any, reply: HTTPReply) -> LLMError:
        """Return the error of an exception inside a stream, with the status that AWS uses elsewhere."""
        status = _STATUSES.get(str(data.get("code")).lower()) if isinstance(data, dict) else None
        return super().fault(data if status is None else {**data, "status": status}, reply)


def _cited(content: Any) -> str:
    """Return the text of a block with citations."""
    parts = content.get("content") if isinstance(content, dict) else None
    texts = [part.get("text") for part in (parts if isinstance(parts, list) else ()) if isinstance(part, dict)]
    return "".join([text for text in texts if isinstance(text, str)])


def _thought(content: Any) -> str:
    inner = content.get("reasoningText") if isinstance(content, dict) else None
    text = inner.get("text") if isinstance(inner, dict) else None
    return text if isinstance(text, str) else ""


def _usage(usage: WireUsage) -> Usage:
    given, cached, written = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_write_input_tokens
    if given is not None:
        given += max(cached or 0, 0) + max(written or 0, 0)
    return Usage(
        input_tokens=given,
        output_tokens=with_rest(usage.output_tokens, given, usage.total_tokens),
        cached_tokens=cached,
        cache_write_tokens=written,
    )
