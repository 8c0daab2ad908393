"""Amazon Bedrock's Converse under a bearer key (AWS_BEARER_TOKEN_BEDROCK), whole answers and streams.

Requests that are signed with AWS credentials are not made.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from aggregator.errors import APIConnectionError, APIStatusError, LLMError
from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.aws_frames import FrameParser, is_framed, read_fault
from aggregator.llm.codecs.base import JSONCodec, words
from aggregator.llm.codecs.bedrock_messages import (
    messages_of,
    output_config_of,
    system_of,
    tool_choice_of,
    tool_of,
)
from aggregator.llm.codecs.sse import CompletingCodec, Event, EventReader
from aggregator.llm.codecs.wire import as_raw, raw_text, read
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage


class _ToolUse(Struct, gc=False, rename="camel"):
    tool_use_id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()


class Block(Struct, gc=False, rename="camel"):
    """One block of content; kinds that are not known are skipped."""

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
    """`inputTokens` counts what no cache held: the two others come on top."""

    input_tokens: int | None = None
    output_tokens: int | None = None
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


class ConverseStream(EventReader):
    """Reads the frames of a streamed answer; the deltas are those of the text blocks."""

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._parser = FrameParser()  # type: ignore[assignment]
        self._answer = Answer()
        self._blocks: dict[int, dict[str, Any]] = {}

    def event(self, event: Event) -> str:
        """Take one event and return the text it brings."""
        told = read(event.data, _EVENT_DECODER)
        if told.error:
            raise self.codec.fault(told.error, HTTPReply(status=200, body=event.data, headers={}))
        self._answer.stop_reason = told.stop_reason or self._answer.stop_reason
        self._answer.usage = told.usage or self._answer.usage
        index = told.content_block_index or 0
        if told.start is not None and (use := told.start.tool_use) is not None:
            self._blocks[index] = {"toolUse": {"toolUseId": use.tool_use_id, "name": use.name, "input": ""}}
        return "" if told.delta is None else self._grow(index, told.delta)

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer; raises APIConnectionError if the stream was cut."""
        if not self._events and is_framed(reply.body):
            raise APIConnectionError("Expected a stream of frames, got its end within the first", status=reply.status)
        return super().finish(reply)

    def whole(self) -> bool:
        """Return True once the answer said why it ended."""
        return self._answer.stop_reason is not None

    def build(self, reply: HTTPReply) -> Completion:
        """Put the blocks together, as they would have come in one piece."""
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
        if isinstance(told := delta.reasoning_content, dict):
            thought = block.setdefault("reasoningContent", {})
            if isinstance(hidden := told.get("redactedContent"), str):
                thought["redactedContent"] = thought.get("redactedContent", "") + hidden
            for name in ("text", "signature"):
                if isinstance(part := told.get(name), str):
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
        """Return the request; raises ConfigError for an image by address and for what this API cannot say."""
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
        """Read an answer, also a stream that came in one piece; raises LLMError where there is none."""
        if not is_framed(reply.body):
            return super().decode(reply, call)
        reader = self.stream(call)
        reader.feed(reply.body)
        return reader.finish(reply)

    def completion(self, answer: Answer, reply: HTTPReply) -> Completion:
        """Turn a parsed answer into a Completion; raises where it is an error or holds no content."""
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
        """Return the error of an error status, of the kind that AWS names in a header or in the body."""
        found = read_fault(reply.body)
        if not found.words:
            return super().error(reply)
        kind = reply.headers.get("x-amzn-errortype", "").partition(":")[0] or found.kind
        body = msgspec.json.encode({"error": {"message": found.words, "code": kind}})
        return super().error(replace(reply, body=body))

    def fault(self, data: Any, reply: HTTPReply) -> LLMError:
        """Return the error of an exception inside a stream, of the status that AWS gives it elsewhere."""
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
    return Usage(
        input_tokens=None if given is None else given + (cached or 0) + (written or 0),
        output_tokens=usage.output_tokens,
        cached_tokens=cached,
        cache_write_tokens=written,
    )
