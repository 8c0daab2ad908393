"""Anthropic's Messages: our calls to its blocks, its blocks to our answers."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from aggregator.errors import APIStatusError, ConfigError, DecodeError, EmptyResponseError
from aggregator.llm.calls import ChatCall, StreamReader, Target
from aggregator.llm.codecs.anthropic_answers import DECODER, SAID_NOTHING, Answer, Block, arguments
from aggregator.llm.codecs.anthropic_messages import messages_of, system_of, tool_choice_of, tool_of
from aggregator.llm.codecs.anthropic_stream import MessageStream
from aggregator.llm.codecs.failures import fault_inside, request_id, status_error
from aggregator.llm.codecs.finish import REASONS
from aggregator.llm.codecs.lenient import REFUSED, excerpt, read
from aggregator.llm.codecs.requests import Envelope, secrets
from aggregator.llm.codecs.sse import read_other
from aggregator.records import Choice, Completion, HTTPReply, HTTPRequest, Message, ToolCall, Usage

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
