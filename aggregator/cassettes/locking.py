"""One process records a cassette at a time."""

from __future__ import annotations

import os
from pathlib import Path

from aggregator.errors import CassetteError, CassetteLockedError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks; two recording processes are the user's to keep apart
    fcntl = None  # type: ignore[assignment]


class FileLock:
    """An advisory lock beside a file, gone with its process however that ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock; raises CassetteLockedError naming the process that holds it."""
        self._path = path.with_name(f"{path.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._take(path)
        except OSError as error:
            raise CassetteError(
                f"expected to record into {path}, got {error}; make the folder writable, choose another path, "
                'or replay with mode="none"'
            ) from error

    def _take(self, path: Path) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
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
                    f"expected to write {path}, got a lock held by {holder}; wait for it, or write elsewhere"
                ) from None
            os.close(file)

    def _is_current(self, file: int) -> bool:
        """Say whether the locked file still bears the name: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the lock; a second call does nothing."""
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1
