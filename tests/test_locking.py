"""One process records a cassette at a time, and a dead process leaves no lock."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aggregator.errors import CassetteLockedError
from aggregator.files import FileLock

HOLD = """
import sys
from pathlib import Path
from aggregator.files import FileLock
lock = FileLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_recording_process_is_named(tmp_path: Path) -> None:
    """A second process gets an error that names the first; when that is killed, the lock is free."""
    path = tmp_path / "a.yaml"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CassetteLockedError, match=f"held by process {other.pid};"):
            FileLock(path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        FileLock(path).release()
    assert list(tmp_path.iterdir()) == []


def test_releasing_twice(tmp_path: Path) -> None:
    """A second release does nothing, even if another process has the lock by then."""
    lock = FileLock(tmp_path / "a.yaml")
    lock.release()
    other = FileLock(tmp_path / "a.yaml")
    lock.release()
    with pytest.raises(CassetteLockedError):
        FileLock(tmp_path / "a.yaml")
    other.release()
