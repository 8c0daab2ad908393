"""Files and folders: written whole or not at all, and readable by their owner only.

Functions take text or `os.PathLike` and raise OSError; callers turn it into an error with a remedy.
`private=False` leaves the permissions of new files and folders to the umask, for files that are meant to be shared.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pathlib

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

Path = str | os.PathLike[str]


def make_folder(path: Path, *, private: bool = True) -> None:
    """Create a folder and the missing ones above it; folders that exist keep their permissions."""
    folder = os.fspath(path) or "."
    if os.path.isdir(folder):  # noqa: PTH112 - pathlib would be one more import in production
        return
    parent = os.path.dirname(folder)  # noqa: PTH120 - as above
    if parent and parent != folder:
        make_folder(parent, private=private)
    with suppress(FileExistsError):  # another process was faster; a file of that name shows when it is used
        os.mkdir(folder, PRIVATE_FOLDER if private else 0o777)  # noqa: PTH102 - as above


def open_file(path: Path, flags: int, *, private: bool = True) -> int:
    """Open a file by the flags of `os.open`, and as bytes; one that is created gets the permissions 0600."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), PRIVATE_FILE if private else 0o666)


LONGEST_NAME = 255
"""Bytes that file systems take for a name."""


def beside(path: pathlib.Path, ending: str) -> pathlib.Path:
    """Return the path of a file in the same folder, with this name and an ending; a long name is shortened.

    >>> from pathlib import Path
    >>> beside(Path("a/b.yaml"), ".lock").as_posix(), len(beside(Path("b" * 255), ".lock").name)
    ('a/b.yaml.lock', 222)
    """
    return path.with_name(_with_ending(path.name, ending))


def _with_ending(name: str, ending: str) -> str:
    data = os.fsencode(name)
    if len(data) + len(ending) <= LONGEST_NAME:
        return name + ending
    from hashlib import sha256  # needed for names that few files have

    return f"{data[:200].decode(errors='ignore')}-{sha256(data).hexdigest()[:16]}{ending}"


def write_atomically(path: Path, data: bytes, *, private: bool = True, sole_writer: bool = False) -> None:
    """Replace the content of a file, creating missing folders: a crash leaves the old file or the new one.

    A file that exists keeps its permissions, and a link is followed: the file that it names is replaced.
    With `sole_writer` (the caller holds a lock) the temporary file has one name, so that the next write replaces what a
    killed process left; otherwise each process and thread has its own temporary file.
    """
    from threading import get_ident  # needed to write only, not to load what was written

    target = os.path.realpath(path)
    make_folder(os.path.dirname(target), private=private)  # noqa: PTH120 - as above
    folder, name = os.path.split(target)
    ending = ".tmp" if sole_writer else f".{os.getpid()}.{get_ident()}.tmp"
    temporary = os.path.join(folder, _with_ending(name, ending))  # noqa: PTH118 - as above
    with suppress(FileNotFoundError):
        os.unlink(temporary)  # noqa: PTH108 - left by a process that was killed
    try:
        file = open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, private=private)
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):
            os.chmod(temporary, os.stat(target).st_mode & 0o777)  # noqa: PTH101, PTH116 - as above
        os.replace(temporary, target)  # noqa: PTH105 - as above
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108 - as above
        raise
