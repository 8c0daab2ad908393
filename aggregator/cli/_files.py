"""Cassettes on disk as commands meet them: read, damaged, or being recorded at this moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aggregator.cassettes.exchanges import Recording
from aggregator.cassettes.journal import is_open_journal
from aggregator.cassettes.storage import FileLock, followed, read
from aggregator.errors import CassetteError, ConfigError


def read_cassette(path: Path, *, redact: bool = True) -> Recording:
    """Return what a cassette holds; raises ConfigError where there is none, CassetteError where it cannot be read."""
    file = followed(path) if path.is_file() else path  # a pipe's link leads nowhere
    recording = None if path.is_dir() else read(file, redact=redact)
    if recording is None:
        there = "which is a folder" if path.is_dir() else "which is not there"
        raise ConfigError(f"Expected a cassette, got {str(path)!r}, {there}")
    return recording


def readable(paths: Iterable[Path], problems: list[str], *, redact: bool = True) -> Iterator[tuple[Path, Recording]]:
    """Yield the cassettes that can be read, and add to the problems why another cannot."""
    for path in paths:
        try:
            recording = read_cassette(path, redact=redact)
        except CassetteError as error:
            problems.append(str(error))
            continue
        yield path, recording


@contextmanager
def rewriting(path: Path) -> Iterator[None]:
    """Keep recordings away from a file while it is written anew.

    Raises CassetteLockedError where one is going on, CassetteError where one was killed and would be taken up.
    """
    path = followed(path)
    lock = FileLock(path)
    try:
        if path.is_file() and path.stat().st_size and is_open_journal(path.read_bytes()):
            raise CassetteError(
                f"Expected a finished cassette to write anew, got a recording that was not finished ({path}); "
                'finish it: run it again with mode="once"; or convert it to another file'
            )
        yield
    finally:
        lock.release()
