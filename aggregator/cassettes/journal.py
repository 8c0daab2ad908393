"""The append-only file: a vcrpy cassette that grows by one line per exchange and survives a kill at any time.

    # aggregator-cassette format=1 layout=journal state=open
    version: 1
    interactions:
    - {"request":{...},"response":{...},"x":"{...}"}

An exchange is written to the kernel before its answer is used, and flushed to the device (fdatasync) with the first
exchange after `SYNC_SECONDS`, every `SYNC_LINES` exchanges at the latest, and at close. A process that dies loses
nothing; a power failure loses at most the exchanges since the last flush.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

from msgspec import Struct

from aggregator.cassettes.exchanges import REMEDY, UNREADABLE, Recording, Row, index_spans, line_is_whole
from aggregator.errors import CassetteDamagedError, CassetteError, CassetteRefusedError
from aggregator.files import open_file

FORMAT = 1
Layout = Literal["journal", "readable"]
PREAMBLE = b"version: 1\ninteractions:\n"
EMPTY = b"version: 1\ninteractions: []\n"
"""The content of a finished cassette without exchanges, in either layout; an empty `interactions:` is not a list."""
OPEN_COMMENT = b"# aggregator-cassette format=1 layout=journal state=open\n"
_MARK = b"# aggregator-cassette "
_CLOSED = re.compile(
    rb"format=1 layout=(journal|readable) state=closed (?:shard=(\d+)/(\d+) set=([0-9a-f]{12}) )?"
    rb"exchanges=(\d+) sha256=([0-9a-f]{64})"
)


class Comment(Struct, frozen=True, kw_only=True):
    """The comment of a closed cassette. `shard` counts from 1; `set` names the recording that its shards belong to."""

    layout: Layout
    exchanges: int
    sha256: str
    shard: int = 1
    shards: int = 1
    set: str = ""

    def render(self) -> bytes:
        """Return the comment for the file, including the line break."""
        part = f"shard={self.shard}/{self.shards} set={self.set} " if self.shards > 1 else ""
        return (
            f"# aggregator-cassette format={FORMAT} layout={self.layout} state=closed {part}"
            f"exchanges={self.exchanges} sha256={self.sha256}\n"
        ).encode()


def parse_comment(first_line: bytes, where: str) -> Comment | None:
    """Return the comment in the first line; None for an open journal; raises for anything else with our mark.

    Call `has_comment` first, which checks that the line is ours.
    """
    if first_line == OPEN_COMMENT.rstrip():
        return None
    if match := _CLOSED.fullmatch(first_line.removeprefix(_MARK)):
        layout, shard, shards, group, exchanges, digest = match.groups()
        return Comment(
            layout="journal" if layout == b"journal" else "readable",
            exchanges=int(exchanges),
            sha256=digest.decode(),
            shard=int(shard or 1),
            shards=int(shards or 1),
            set=(group or b"").decode(),
        )
    if (version := re.match(rb"format=(\d+) ", first_line.removeprefix(_MARK))) and int(version[1]) > FORMAT:
        raise CassetteRefusedError(
            f"Expected format {FORMAT} in {where}, got {int(version[1])}; "
            "a newer release of the library wrote it: upgrade"
        )
    raise CassetteDamagedError(
        f"Expected the leading comment of a cassette, got {first_line[:120]!r} - at {where}:1; "
        "the file was cut or edited: restore it, or delete it and record again"
    )


def has_comment(data: bytes) -> bool:
    """Return True if the file begins with our mark."""
    return data.startswith(_MARK)


def content_hash(content: bytes | memoryview) -> str:
    """Return the hash in a leading comment, for the rest of the file."""
    return sha256(content).hexdigest()


SYNC_LINES = 1_024  # about 5 MB; an fdatasync blocks the event loop for milliseconds
SYNC_SECONDS = 1.0
FLUSH: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has only the stronger one


class Journal:
    """Appends lines to one file; raises CassetteError if the disk refuses, and leaves nothing half-written."""

    def __init__(
        self,
        path: Path,
        *,
        keep: int = 0,
        private: bool = True,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[int, bytes], int] = os.write,
        flush: Callable[[int], None] = FLUSH,
    ) -> None:
        """Append after the first `keep` bytes of the existing file; 0 starts a new file, for its owner if private."""
        self.path = path
        self._private = private
        self._clock, self._write, self._flush = clock, write, flush
        self._refused: OSError | None = None
        self._file, self._size, self._found = -1, keep, keep
        self._is_closed = False
        self._unsynced, self._synced_at = 0, clock()

    def _open(self) -> None:
        """Open the file at the first line, so that a cassette without exchanges leaves no file."""
        try:
            self._file = open_file(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, private=self._private)
            os.ftruncate(self._file, self._size)
        except OSError as error:
            raise CassetteError(
                f"Expected to record into {self.path}, got {error}; make it writable, choose another path, "
                'or replay with mode="none"'
            ) from error

    def extend(self, lines: Sequence[bytes]) -> None:
        """Write exchanges, all or none."""
        if self._is_closed:
            raise CassetteError(f"Expected to append to an open journal, got one that is finished ({self.path})")
        if self._file < 0:
            self._open()
        head = b"- " if self._size else OPEN_COMMENT + PREAMBLE + b"- "
        self._append(b"".join((head, b"\n- ".join(lines), b"\n")))
        self._unsynced += len(lines)
        if self._unsynced >= SYNC_LINES or self._clock() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def _append(self, data: bytes) -> None:
        done = 0
        try:
            while done < len(data):
                done += self._write(self._file, data[done:] if done else data)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise CassetteError(
                f"Expected to append {len(data)} bytes to {self.path}, got {error}; free some space: "
                "the answer is kept in memory and written when the cassette closes, if there is room by then"
            ) from error
        self._size += len(data)

    def sync(self) -> None:
        """Flush to the device; failures are reported at close, because the kernel has the lines."""
        try:
            self._flush(self._file)
        except OSError as error:
            self._refused = self._refused or error
        self._unsynced, self._synced_at = 0, self._clock()

    def undo(self) -> None:
        """Undo the appended lines, once closed: the file is restored, or removed if it is new."""
        if not self.path.exists():
            return
        if self._found:
            os.truncate(self.path, self._found)
        else:
            self.path.unlink()

    def close(self) -> None:
        """Flush and close; nothing can be appended afterwards, and a second call does nothing.

        Raises CassetteError if the device did not accept the data.
        """
        self._is_closed = True
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
            if not self._size:  # the disk refused even the first line
                self.path.unlink(missing_ok=True)
        if self._refused is not None:
            refused, self._refused = self._refused, None
            raise CassetteError(
                f"Expected the device to keep what was recorded into {self.path}, got {refused}; "
                "the disk may be failing: save a copy elsewhere, and record again"
            ) from refused


OPENING = OPEN_COMMENT + PREAMBLE
_ITEM = b"- "
_Span = tuple[int, int]


def is_open_journal(data: bytes) -> bool:
    """Return True for an unfinished recording, by its comment, or by its first line if the comment is missing."""
    if data.startswith(OPEN_COMMENT) or OPENING.startswith(data):
        return True
    if not data.startswith(PREAMBLE + b'- {"request":'):
        return False
    return data.find(rb",\"sha256\":\"", 0, data.find(b"\n", len(PREAMBLE)) % (len(data) + 1)) > 0


def read_open_journal(data: bytes, where: str) -> Recording:
    """Read the journal of a recording that was not closed."""
    if OPENING.startswith(data):
        finding = f"{where}: not closed; no exchange was written yet"
        return Recording(rows=(), state="open", layout="journal", findings=(finding,), kept=0)
    start = data.find(PREAMBLE)
    if start not in (0, len(OPEN_COMMENT)):
        raise CassetteDamagedError(f"Expected {PREAMBLE.decode()!r} - at {where}:2; {REMEDY}")
    start += len(PREAMBLE)
    first = data.count(b"\n", 0, start) + 1
    spans = list(_spans(data, start))
    kept = len(data)
    torn = _torn(data, spans, where, first)
    if torn:
        kept = spans.pop()[0] - len(_ITEM)
    findings = [f"{where}: not closed, so it may end early; its {len(spans)} exchanges are good"]
    if torn:
        findings.append(f"{where}:{first + len(spans)}: the last exchange was torn and is dropped")
    rows = _rows(data, spans, where)
    return Recording(rows=rows, state="open", layout="journal", findings=tuple(findings), kept=kept)


def read_closed_journal(content: bytes, where: str, *, intact: bool, skipped: int) -> Recording:
    """Read a finished journal after its comment of `skipped` lines; `intact` if its hash is right."""
    if content == EMPTY:
        return Recording(rows=(), state="closed", layout="journal")
    if not content.startswith(PREAMBLE):
        raise CassetteDamagedError(
            f"Expected {PREAMBLE.decode()!r}, got {content[:40]!r} - at {where}:{skipped + 1}; {REMEDY}"
        )
    spans = list(_spans(content, len(PREAMBLE)))
    if not intact:
        first = skipped + PREAMBLE.count(b"\n") + 1
        if _torn(content, spans, where, first):
            raise _damaged(where, first + len(spans) - 1)
    return Recording(rows=_rows(content, spans, where), state="closed", layout="journal")


def _spans(data: bytes, start: int) -> Iterator[_Span]:
    """Yield the start and end of each item's JSON, without the mark before it."""
    find, size = data.find, len(data)
    while start < size:
        end = find(b"\n", start)
        end = size if end < 0 else end
        yield start + len(_ITEM), end
        start = end + 1


def _torn(data: bytes, spans: list[_Span], where: str, first: int) -> bool:
    """Return True if the last item is torn; raise for the first item that is damaged in another way, with its line.

    An item without its line break counts as torn, because the next one would be joined to it.
    """
    view = memoryview(data)
    for index, (start, end) in enumerate(spans):
        last = index == len(spans) - 1 and data[-1:] != b"\n"
        whole = data[start - len(_ITEM) : start] == _ITEM and line_is_whole(view[start:end])
        if not whole and not last:
            raise _damaged(where, first + index)
    return bool(spans) and data[-1:] != b"\n"


def _damaged(where: str, line: int) -> CassetteDamagedError:
    return CassetteDamagedError(f"Expected an exchange and its hash, got something else - at {where}:{line}; {REMEDY}")


def _rows(data: bytes, spans: list[_Span], where: str) -> tuple[Row, ...]:
    try:
        return tuple(index_spans(data, spans))
    except UNREADABLE as error:
        raise CassetteDamagedError(f"Expected an exchange, got {error} - in {where}; {REMEDY}") from error
