"""Finished cassettes on disk: canonical order, one atomic replacement, shards where one file would be too large."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal

from aggregator.cassettes.blocks import render_exchange
from aggregator.cassettes.exchanges import Row
from aggregator.cassettes.journal import EMPTY, PREAMBLE, Comment, Layout, content_hash
from aggregator.cassettes.lineage import natural
from aggregator.cassettes.reading import shard_path
from aggregator.errors import CassetteError, CassetteLockedError
from aggregator.files import beside, make_folder, open_file, write_atomically

SHARD_BYTES = 10_000_000
"""Above this a cassette goes into shards; hosts of git warn of files of 50 MB."""
READABLE_BYTES = 1_000_000
"""Up to this a cassette closes as readable; more is no longer reviewed, and loads faster as a journal."""

LONGEST_READABLE = 4 << 20
"""A longer exchange makes the cassette a journal, which loads faster than YAML."""

LayoutChoice = Literal["auto", "journal", "readable"]


def canonical_order(rows: Sequence[Row]) -> list[Row]:
    """Sort by lineage (numbers as numbers), then order of issue within it, then attempt: never by arrival."""
    return sorted(
        rows, key=lambda row: (natural(row.facts.lineage), row.facts.order, row.facts.ticket, row.facts.attempt)
    )


def save(path: Path, rows: Sequence[Row], layout: LayoutChoice = "auto", *, private: bool = True) -> None:
    """Write a finished cassette; what stood there is replaced at once, when its successor is whole, or not at all.

    One exchange too long for a line of YAML that we would read makes it a journal, whatever was asked for.
    """
    path = followed(path)
    ordered = canonical_order(rows)
    sizes = [row.end - row.start for row in rows]
    if layout == "auto":
        layout = "readable" if sum(sizes) <= READABLE_BYTES else "journal"
    if max(sizes, default=0) >= LONGEST_READABLE:
        layout = "journal"
    contents = list(_shards(ordered, layout))
    digests = [content_hash(content) for content, _ in contents]
    group = sha256("".join(digests).encode()).hexdigest()[:12] if len(contents) > 1 else ""
    comments = [
        Comment(layout=layout, exchanges=count, sha256=digest, shard=number, shards=len(contents), set=group)
        for number, ((_, count), digest) in enumerate(zip(contents, digests, strict=True), 1)
    ]
    others = [shard_path(path, group, number) for number in range(2, len(contents) + 1)]
    try:
        for file, comment, (content, _) in reversed(list(zip((path, *others), comments, contents, strict=True))):
            write_atomically(file, comment.render() + content, private=private, sole_writer=True)
    except OSError as error:
        raise CassetteError(
            f"Expected to write the cassette {path}, got {error}; free some space or make the folder writable. "
            "What was recorded is still in its journal, and is taken up by the next recording"
        ) from error
    for old in shards_beside(path):
        if old not in others:
            old.unlink()


def followed(path: Path) -> Path:
    """Return the file that a link stands for, so that it is written and not the link replaced."""
    return path.resolve() if path.is_symlink() else path


def shards_beside(path: Path) -> list[Path]:
    """Return every further shard of this name, of whichever recording."""
    name = re.compile(rf"{re.escape(path.stem)}\.[0-9a-f]{{12}}\.\d{{4}}{re.escape(path.suffix)}")
    return sorted(file for file in path.parent.iterdir() if name.fullmatch(file.name))


def _shards(rows: Sequence[Row], layout: Layout) -> Iterator[tuple[bytes, int]]:
    """Yield contents of about `SHARD_BYTES`, each with its number of exchanges; at least one."""
    parts, size = [PREAMBLE if rows else EMPTY], 0
    for row in rows:
        item = _render(row, layout)
        if size and size + len(item) > SHARD_BYTES:
            yield b"".join(parts), len(parts) - 1
            parts, size = [PREAMBLE], 0
        parts.append(item)
        size += len(item)
    yield b"".join(parts), len(parts) - 1


def _render(row: Row, layout: Layout) -> bytes:
    if layout == "journal":
        return b"- %b\n" % row.line
    return render_exchange(row.exchange(), row.line).encode()


try:
    import fcntl
except ImportError:  # Windows: no advisory locks; two recording processes are the user's to keep apart
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """An advisory lock beside a file, gone with its process however that ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock; raises CassetteLockedError naming the process that holds it."""
        self._path = beside(path, ".lock")
        self._process = os.getpid()
        try:
            make_folder(path.parent)
            self._file = self._take(path)
        except OSError as error:
            raise CassetteError(
                f"Expected to record into {path}, got {error}; make the folder writable, choose another path, "
                'or replay with mode="none"'
            ) from error

    def _take(self, path: Path) -> int:
        while True:
            file = open_file(self._path, os.O_RDWR | os.O_CREAT)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(file):
                    os.ftruncate(file, 0)
                    os.write(file, f"process {os.getpid()}".encode())
                    return file
            except BlockingIOError:
                holder = os.read(file, 100).decode(errors="replace") or "another process"
                os.close(file)
                raise CassetteLockedError(
                    f"Expected to write {path}, got a lock held by {holder}; wait for it, or write elsewhere"
                ) from None
            os.close(file)

    def _is_current(self, file: int) -> bool:
        """Say whether the locked file still bears the name: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the lock; a second call does nothing, and one in a forked process neither.

        It is closed before it is unlinked: Windows unlinks no open file. So that nobody takes it in between and loses
        it, it gives up its name first.
        """
        if self._file < 0 or os.getpid() != self._process:
            return
        gone = self._path
        if fcntl is not None:
            gone = beside(self._path, f".{os.getpid()}")
            with suppress(FileNotFoundError):
                self._path.replace(gone)
        os.close(self._file)
        self._file = -1
        gone.unlink(missing_ok=True)
