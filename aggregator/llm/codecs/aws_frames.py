"""AWS's event stream, sans I/O: binary frames with checksums, each an event of JSON or an exception.

A frame is its length and that of its headers, their checksum, the headers, the payload, and a checksum of it all; see
the specification of application/vnd.amazon.eventstream.
"""

from __future__ import annotations

import struct
from binascii import crc32

import msgspec
from msgspec import Struct

from aggregator.errors import DecodeError
from aggregator.llm.codecs.sse import Event
from aggregator.llm.codecs.wire import excerpt, read

_PRELUDE = 12
_CHECKSUM = 4
_LARGEST = 1 << 24  # AWS's own limit
_TEXT, _BYTES = 7, 6  # the types of header values that state their own length
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # those of all others


class Fault(Struct, rename={"kind": "__type"}):
    """What AWS says of an error: in the body of an error status, or in a frame."""

    message: str | None = None
    Message: str | None = None
    kind: str | None = None

    @property
    def words(self) -> str:
        """The message under either name."""
        return self.message or self.Message or ""


_FAULT = msgspec.json.Decoder(Fault)


def read_fault(body: bytes) -> Fault:
    """Read what AWS says of an error; without words for anything else.

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
    """Cuts bytes into frames, each an event by its `:event-type`; an exception is an event named `error`.

    Bytes that do not begin with a frame are an answer of another kind and give no events.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._is_begun = self._is_other = False

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes, cut anywhere, and return the events they complete; raises DecodeError for damage."""
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
        """Return no event: half a frame is none."""
        return []

    def _refuse(self) -> None:
        if self._is_begun:
            raise DecodeError(f"Expected a frame of AWS's event stream, got {excerpt(bytes(self._rest[:40]))}")
        self._is_other = True


def _event(headers: dict[str, str], payload: bytes) -> Event:
    """Return the event of a frame; the kind of an exception becomes its code."""
    kind = headers.get(":exception-type") or headers.get(":error-code")
    if kind is None:
        return Event(headers.get(":event-type", ""), payload)
    words = read_fault(payload).words or headers.get(":error-message") or kind
    return Event("error", msgspec.json.encode({"error": {"code": kind, "message": words}}))


def _headers(data: bytes) -> dict[str, str]:
    """Return the headers whose values are texts."""
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
