"""Messages as a stream: blocks that begin, grow and stay whole, so that the answer can go back as it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from aggregator.llm.calls import ChatCall, Codec
from aggregator.llm.codecs.anthropic_answers import DECODER, Answer, WireUsage
from aggregator.llm.codecs.failures import fault_in_event
from aggregator.llm.codecs.lenient import read
from aggregator.llm.codecs.sse import Event, EventReader
from aggregator.records import Completion, HTTPReply


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
