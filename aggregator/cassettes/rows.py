"""A recorded exchange as bytes, with what finds it again; and all of those that one cassette holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from aggregator.cassettes.exchanges import Buffer, Exchange, Place, body_bytes, decode_head, decode_line
from aggregator.cassettes.keys import Ignore, raw_key, request_key

State = Literal["closed", "open", "foreign"]
REMEDY = "the file was cut or edited: restore it from version control, or delete it and record again"


class Row(Struct, frozen=True, gc=False):
    """One exchange as bytes, decoded when it is played; the digest of its request's bytes; its place in the run."""

    line: Buffer
    raw: bytes
    place: Place
    ignore: Ignore = ()
    known_key: bytes = b""

    @property
    def key(self) -> bytes:
        """The canonical key of its request; computed when first needed, as most replays ask for the recorded bytes."""
        if not self.known_key:
            request = decode_head(self.line).request
            key = request_key(request.method, request.uri, body_bytes(request.body), self.ignore)
            force_setattr(self, "known_key", key)
        return self.known_key

    def exchange(self) -> Exchange:
        """Decode the whole row."""
        return decode_line(self.line)


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


def index_lines(lines: Iterable[Buffer], ignore: Ignore = ()) -> Iterator[Row]:
    """Compute the digests of good lines; no stored one is trusted."""
    for line in lines:
        head = decode_head(line)
        request = head.request
        yield Row(line, raw_key(request.method, request.uri, body_bytes(request.body)), head.x, ignore)
