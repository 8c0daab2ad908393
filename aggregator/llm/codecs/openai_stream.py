"""Chat completions as a stream: deltas of several choices, tool calls in pieces, usage once, often or never."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from aggregator.llm.calls import ChatCall
from aggregator.llm.codecs.failures import fault_in_event
from aggregator.llm.codecs.openai_answers import (
    DECODER,
    Answer,
    WireChoice,
    WireFunction,
    WireMessage,
    WireToolCall,
    WireUsage,
    arguments_text,
    reasoning_text,
    text_and_thoughts,
    tool_call,
)
from aggregator.llm.codecs.sse import CompletingCodec, Event, EventReader
from aggregator.llm.codecs.wire import ThinkingFilter, read
from aggregator.records import Completion, HTTPReply


class _Growing(Struct):
    """A choice as far as it has come."""

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


class ChatStream(EventReader):
    """Reads a stream of chat completion chunks; the deltas are those of the first choice, thinking left out."""

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        super().__init__(codec, call)
        self._choices: dict[int, _Growing] = {}
        self._thinking = ThinkingFilter()
        self._answer = Answer()

    def event(self, event: Event) -> str:
        """Take one chunk and return the text it brings."""
        chunk = Answer(error=fault_in_event(event.data)) if event.name == "error" else read(event.data, DECODER)
        failed = chunk.error or next((choice.error for choice in chunk.choices or () if choice.error), None)
        if failed:
            raise self.codec.fault(failed, HTTPReply(status=200, body=event.data, headers={}))
        self._answer.id = self._answer.id or chunk.id
        self._answer.model = self._answer.model or chunk.model
        self._answer.service_tier = chunk.service_tier or self._answer.service_tier
        self._answer.usage = _latest(self._answer.usage, chunk.usage)
        self._answer.cost = self._answer.cost if chunk.cost is None else chunk.cost
        return "".join([self._grow(choice) for choice in chunk.choices or ()])

    def whole(self) -> bool:
        """Every choice has its finish reason, or the server said [DONE]; not all of them do."""
        ended = [choice.finish_reason is not None for choice in self._choices.values()]
        return self.done or (bool(ended) and all(ended))

    def build(self, reply: HTTPReply) -> Completion:
        """Put the choices together."""
        self._answer.choices = [_whole(index, choice) for index, choice in sorted(self._choices.items())]
        return self.codec.completion(self._answer, reply)

    def _grow(self, choice: WireChoice) -> str:
        index = choice.index or 0
        growing = self._choices.setdefault(index, _Growing())
        growing.finish_reason = choice.finish_reason or growing.finish_reason
        delta = choice.delta or choice.message
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
    """Usage comes in several chunks, each a sum so far: the last number said counts."""
    if usage is None or newer is None:
        return newer or usage
    for name in WireUsage.__struct_fields__:
        value = getattr(newer, name)
        if value is not None:
            setattr(usage, name, value)
    return usage


def _grow_call(calls: list[WireToolCall], piece: WireToolCall) -> None:
    """Add a piece to the call it belongs to: by index; a name with another id begins a new one.

    A piece that names nothing continues the last call, whatever index it has, and a new id alone splits none.
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
    function = function or WireFunction(arguments="")
    function.name = function.name or piece.name
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
