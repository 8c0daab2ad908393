"""One process records a cassette, or writes a run folder, at a time: a lock next to the file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from aggregator.errors import CassetteError, CassetteLockedError
from aggregator.files import make_folder, open_file, sibling_path

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; two processes must not record one file
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """An advisory lock next to a file, released with its process however that ends.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     lock = FileLock(Path(folder) / "a.yaml")
    ...     locked = [path.name for path in Path(folder).iterdir()]
    ...     lock.release()
    ...     print(locked, list(Path(folder).iterdir()))
    ['a.yaml.lock'] []
    """

    def __init__(self, path: Path) -> None:
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
        gone = self._path
        if fcntl is not None:
            gone = sibling_path(self._path, f".{os.getpid()}")
            with suppress(FileNotFoundError):
                self._path.replace(gone)
        os.close(self._file)
        self._file = -1
        gone.unlink(missing_ok=True)
