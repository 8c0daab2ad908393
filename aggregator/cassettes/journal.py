"""The append-only file: a vcrpy cassette that grows by one line an exchange and survives a kill at any moment.

    # aggregator-cassette format=1 layout=journal state=open
    version: 1
    interactions:
    - {"request":{...},"response":{...},"x":"{...}"}

An exchange is with the kernel before its answer is used, and is flushed to the device (fdatasync) with the first
exchange after `SYNC_SECONDS`, every `SYNC_LINES` exchanges at the latest, and at close. A process that dies loses
nothing; a machine that loses power loses at most what came since the last flush.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aggregator.cassettes.comments import OPEN_COMMENT, PREAMBLE
from aggregator.errors import CassetteError

SYNC_LINES = 1_024  # about 5 MB; an fdatasync holds the event loop for milliseconds
SYNC_SECONDS = 1.0
FLUSH: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has only the stronger one


class Journal:
    """Appends lines to one file; raises CassetteError when the disk refuses, with nothing half-written left behind."""

    def __init__(
        self,
        path: Path,
        *,
        keep: int = 0,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[int, bytes], int] = os.write,
        flush: Callable[[int], None] = FLUSH,
    ) -> None:
        """Append after the first `keep` bytes of what is there; 0 starts a new file."""
        self.path = path
        self._clock, self._write, self._flush = clock, write, flush
        self._refused: OSError | None = None
        self._file, self._size, self._found = -1, keep, keep
        self._is_closed = False
        self._unsynced, self._synced_at = 0, clock()

    def _open(self) -> None:
        """Open the file at the first line, so that a cassette that records nothing leaves nothing."""
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, self._size)
        except OSError as error:
            raise CassetteError(
                f"expected to record into {self.path}, got {error}; make it writable, choose another path, "
                'or replay with mode="none"'
            ) from error

    def extend(self, lines: Sequence[bytes]) -> None:
        """Write exchanges, all of them or none."""
        if self._is_closed:
            raise CassetteError(f"expected to append to an open journal, got one that is finished ({self.path})")
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
                f"expected to append {len(data)} bytes to {self.path}, got {error}; free some space: "
                "the answer is kept in memory and written when the cassette closes, if there is room by then"
            ) from error
        self._size += len(data)

    def sync(self) -> None:
        """Flush to the device; what it refuses is told at close, as the lines are with the kernel all the same."""
        try:
            self._flush(self._file)
        except OSError as error:
            self._refused = self._refused or error
        self._unsynced, self._synced_at = 0, self._clock()

    def undo(self) -> None:
        """Take back what was appended, once closed: the file is as it was found, or gone if there was none."""
        if not self.path.exists():
            return
        if self._found:
            os.truncate(self.path, self._found)
        else:
            self.path.unlink()

    def close(self) -> None:
        """Flush and close, and let nothing be appended any more; a second call does nothing.

        Raises CassetteError where the device did not take what was written.
        """
        self._is_closed = True
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
            if not self._size:  # the disk took not even the first line
                self.path.unlink(missing_ok=True)
        if self._refused is not None:
            refused, self._refused = self._refused, None
            raise CassetteError(
                f"expected the device to keep what was recorded into {self.path}, got {refused}; "
                "the disk may be failing: save a copy elsewhere, and record again"
            ) from refused
