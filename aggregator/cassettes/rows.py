"""A recorded exchange as bytes, with what finds it again; and all of those that one cassette holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from msgspec import DecodeError, Struct
from msgspec.structs import force_setattr

from aggregator.cassettes.exchanges import Exchange, Place, decode_answer, decode_line, decode_place, find_parts
from aggregator.cassettes.keys import Ignore, request_key
from aggregator.errors import CassetteDamagedError
from aggregator.records import HTTPReply

State = Literal["closed", "open", "foreign"]
REMEDY = "the file was cut or edited: restore it from version control, or delete it and record again"
UNREADABLE = (DecodeError, ValueError, KeyError, RecursionError)
"""What decoding a line raises that is none of ours, although its hash is right."""


class Row(Struct, frozen=True, gc=False):
    """One exchange: where in `data` its line stands, from `start` to `end`, and the parts of it; its place in the run.

    The answer is decoded when it is played. `answer` and `facts` are where those parts begin.
    """

    data: bytes
    start: int
    answer: int
    facts: int
    end: int
    place: Place
    ignore: Ignore = ()
    known_key: bytes = b""

    @property
    def line(self) -> bytes:
        """The line, as a journal holds it."""
        return self.data[self.start : self.end]

    @property
    def key(self) -> bytes:
        """The canonical key of its request; computed when first needed, as most replays ask for the recorded bytes."""
        if not self.known_key:
            request = self.exchange().request
            force_setattr(self, "known_key", request_key(request.method, request.url, request.body, self.ignore))
        return self.known_key

    def reply(self) -> HTTPReply:
        """Decode the answer alone; raises CassetteDamagedError."""
        try:
            return decode_answer(self.data[self.answer : self.facts], self.place)
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def exchange(self) -> Exchange:
        """Decode the whole row; raises CassetteDamagedError."""
        try:
            return decode_line(self.line)
        except UNREADABLE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CassetteDamagedError:
        place = self.place
        return CassetteDamagedError(
            f"expected an exchange, got {error} - in lineage {place.lineage!r}, ticket {place.ticket}; {REMEDY}"
        )


class Recording(Struct, frozen=True, kw_only=True):
    """What a cassette holds. `kept` is how many bytes of an open journal are good, `findings` what was repaired."""

    rows: tuple[Row, ...]
    state: State
    layout: Literal["journal", "readable", "foreign"]
    findings: tuple[str, ...] = ()
    kept: int = 0
    size: int = 0
    files: tuple[Path, ...] = ()


NOTHING = Recording(rows=(), state="open", layout="journal")


def index_spans(data: bytes, spans: Iterable[tuple[int, int]], ignore: Ignore = ()) -> Iterator[Row]:
    """Find the lines that start and end there; they are good, so the key that each states is its request's."""
    for start, end in spans:
        answer, facts = find_parts(data, start, end)
        yield Row(data, start, answer, facts, end, decode_place(data, facts, end), ignore)


def index_lines(lines: Iterable[bytes], ignore: Ignore = ()) -> Iterator[Row]:
    """The same for lines that stand alone."""
    for line in lines:
        yield from index_spans(line, [(0, len(line))], ignore)
