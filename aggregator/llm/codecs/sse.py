"""Server-sent events, sans I/O, and what the readers of streamed answers have in common."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from aggregator.errors import APIConnectionError, DecodeError, LLMError
from aggregator.llm.calls import ChatCall, Codec, StreamReader
from aggregator.llm.codecs.failures import request_id
from aggregator.records import Completion, HTTPReply

DONE = b"[DONE]"


class Event(NamedTuple):
    """One event: its name ("" where none was given) and its data."""

    name: str
    data: bytes


class EventParser:
    r"""Cuts bytes into events: CRLF, LF or CR, comments, several data lines, bytes cut anywhere.

    >>> EventParser().feed(b': keep-alive\n\nevent: ping\ndata: {}\n\ndata: half')
    [Event(name='ping', data=b'{}')]
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of a line that is not complete
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes and return the events they complete."""
        if b"\n" not in data and b"\r" not in data and self._rest[-1:] != [b"\r"]:
            self._rest.append(data)
            return []
        text = b"".join([*self._rest, data])
        held = b"\r" if text.endswith(b"\r") else b""  # the first half of CRLF, perhaps
        *lines, rest = text.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = [rest, held] if held else [rest]
        return [event for line in lines if (event := self._line(line))]

    def flush(self) -> list[Event]:
        """Return the last event where the stream ended without its empty line."""
        return self.feed(b"\n\n")

    def _line(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._name, b"\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode("utf-8", errors="replace")
        elif field == b"error":  # older llama.cpp
            self._name, self._data = "error", [value]
        return None


class CompletingCodec(Codec, Protocol):
    """A codec that turns its own typed answer into a Completion, which is what a stream adds up to."""

    def completion(self, answer: Any, reply: HTTPReply) -> Completion:
        """Turn the typed answer into a Completion; raises LLMError."""
        ...

    def fault(self, data: Any, reply: HTTPReply) -> LLMError:
        """Return the error that an answer of status 200 holds."""
        ...


class EventReader:
    """The part of a StreamReader that no provider changes; a subclass reads its own events.

    `event` takes one event and returns the text it brings, `whole` says whether the answer has ended properly, `build`
    puts the answer together.
    """

    def __init__(self, codec: CompletingCodec, call: ChatCall) -> None:
        self.codec = codec
        self.call = call
        self._parser = EventParser()
        self._events = 0
        self.done = False  # the server said [DONE], as gateways do for every API

    def event(self, event: Event) -> str:
        """Take one event and return the text it brings."""
        raise NotImplementedError

    def whole(self) -> bool:
        """Tell whether the answer has come to its end."""
        raise NotImplementedError

    def build(self, reply: HTTPReply) -> Completion:
        """Put the answer together."""
        raise NotImplementedError

    def feed(self, data: bytes) -> list[str]:
        """Take the next bytes, cut anywhere, and return the text deltas they complete."""
        return self._read(self._parser.feed(data))

    def finish(self, reply: HTTPReply) -> Completion:
        """Return the whole answer; raises APIConnectionError where the stream was cut."""
        with suppress(DecodeError):  # half an event: the stream was cut, which is found out below
            self._read(self._parser.flush())
        if not self._events and not is_event_stream(reply.body):  # the server ignored `stream`
            return self.codec.decode(reply, self.call)
        if not self._events or not self.whole():
            raise APIConnectionError(
                f"Expected the stream to end with a finish reason, got its end after {len(reply.body)} bytes",
                status=reply.status,
                request_id=request_id(reply.headers),
            )
        return self.build(reply)

    def _read(self, events: list[Event]) -> list[str]:
        self._events += len(events)
        texts = []
        for event in events:
            if event.data.strip() == DONE:
                self.done = True
            elif event.data.strip() and (text := self.event(event)):
                texts.append(text)
        return texts


def is_event_stream(body: bytes) -> bool:
    """Tell whether a body holds events, whatever its content type says."""
    return body.lstrip().startswith((b"data:", b"event:", b":", b"id:", b"retry:"))


def read_other(error: DecodeError, reply: HTTPReply, reader: StreamReader | None) -> Completion:
    """Read a body that is no JSON object: a stream in one piece (from a cassette, or unasked); else raise the error."""
    if reader is None or not is_event_stream(reply.body):
        error.status, error.request_id = reply.status, request_id(reply.headers)
        raise error
    reader.feed(reply.body)
    return reader.finish(reply)
