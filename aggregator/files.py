"""Files and folders: written atomically, locked by one process at a time, and readable by their owner only.

Functions accept a string or `os.PathLike` and raise OSError; callers convert it to an error with a remedy.
`private=False` leaves the permissions of new files and folders to the umask, for files that are meant to be shared.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from aggregator.errors import CassetteError, CassetteLockedError

if TYPE_CHECKING:
    import pathlib

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; two processes must not record one file
    fcntl = None  # type: ignore[assignment]


PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700

Path = str | os.PathLike[str]


def make_folder(path: Path, *, private: bool = True) -> None:
    """Create a folder and its missing parents; existing folders keep their permissions."""
    folder = os.fspath(path) or "."
    if os.path.isdir(folder):  # noqa: PTH112 - pathlib would be one more import in production
        return
    parent = os.path.dirname(folder)  # noqa: PTH120 - as above
    if parent and parent != folder:
        make_folder(parent, private=private)
    with suppress(FileExistsError):  # another process was faster; a file of that name raises when it is used
        os.mkdir(folder, PRIVATE_FOLDER if private else 0o777)  # noqa: PTH102 - as above


def open_file(path: Path, flags: int, *, private: bool = True) -> int:
    """Open a file with the flags of `os.open`, in binary mode; a new one gets the permissions 0600."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0), PRIVATE_FILE if private else 0o666)


LONGEST_NAME = 255
"""The maximum length in bytes of a name in file systems."""


def sibling_path(path: pathlib.Path, ending: str) -> pathlib.Path:
    """Return the path of a file in the same folder, with this name and a suffix; a long name is shortened.

    >>> from pathlib import Path
    >>> sibling_path(Path("a/b.yaml"), ".lock").as_posix(), len(sibling_path(Path("b" * 255), ".lock").name)
    ('a/b.yaml.lock', 222)
    """
    return path.with_name(_with_ending(path.name, ending))


def _with_ending(name: str, ending: str) -> str:
    data = os.fsencode(name)
    if len(data) + len(ending) <= LONGEST_NAME:
        return name + ending
    from hashlib import sha256  # needed for long names only

    return f"{data[:200].decode(errors='ignore')}-{sha256(data).hexdigest()[:16]}{ending}"


def write_atomically(path: Path, data: bytes, *, private: bool = True, sole_writer: bool = False) -> None:
    """Replace the content of a file and create missing folders; a crash leaves the old file or the new one.

    An existing file keeps its permissions, and a link is followed: its target is replaced. With `sole_writer` (the
    caller holds a lock) the temporary file has one name, so that the next write replaces one left by a killed process;
    otherwise each process and thread has its own temporary file.
    """
    from threading import get_ident  # needed only to write, not to load

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


class FileLock:
    """An advisory lock next to a file, released with its process however that ends.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     lock = FileLock(Path(folder) / "a.yaml")
    ...     locked = [path.name for path in Path(folder).iterdir()]
    ...     lock.release()
    ...     print(locked, list(Path(folder).iterdir()))
    ['a.yaml.lock'] []
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Take the lock; raises CassetteLockedError naming the process that holds it."""
        self._path = sibling_path(path, ".lock")
        self._process = os.getpid()
        try:
            make_folder(path.parent)
            self._file = self._take(path)
        except OSError as error:
            raise CassetteError(
                f"Expected to record into {path}, got {error}; make the folder writable, choose another path, "
                'or replay with mode="none"'
            ) from error

    def _take(self, path: pathlib.Path) -> int:
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
        """Return True if the locked file still has its name, which the previous holder may have removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the lock; a second call, or one in a forked process, does nothing.

        It is closed before it is unlinked, because Windows cannot unlink an open file. It is renamed first, so that no
        other process takes it in between and loses it.
        """
        if self._file < 0 or os.getpid() != self._process:
            return
        moved = self._path
        if fcntl is not None:
            moved = sibling_path(self._path, f".{os.getpid()}")
            with suppress(FileNotFoundError):
                self._path.replace(moved)
        os.close(self._file)
        self._file = -1
        moved.unlink(missing_ok=True)
