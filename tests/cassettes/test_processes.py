"""Cassettes and other processes: forked ones do not touch their parent's files; requirements of Windows."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import aggregator
from aggregator.cassettes.storage import read
from aggregator.records import HTTPReply, HTTPRequest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SCRIPT = """
    import os, sys
    import aggregator
    from aggregator.cassettes.lineage import tape_here
    from aggregator.records import HTTPReply, HTTPRequest

    def call(answer):
        tape = tape_here()
        slot = tape.issue(HTTPRequest(url="http://x/", body=answer.encode(), headers={}))
        played = tape.play(slot)
        if played is None:
            tape.record(slot, HTTPReply(status=200, body=answer.encode(), headers={}))
        return answer

    def in_child(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(pid, 0)

    def child():
        try:
            call("child's")
        except aggregator.errors.CassetteError as error:
            print("refused:", "open another cassette there" in str(error))

    with aggregator.cassette("a.yaml", "all") as tape:
        call("first")
        in_child(child)
        call("second")
        print("recorded", tape.recorded)
"""


def run(script: str, folder: Path) -> str:
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, cwd=folder
    )
    return out.stdout


def bodies(path: Path) -> list[bytes]:
    recording = read(path)
    assert recording is not None
    return [row.exchange().request.body for row in recording.rows]


def test_a_fork_wrote_into_its_parents_journal(tmp_path: Path) -> None:
    """The parent counts its lines, and the file has no more."""
    assert run(SCRIPT, tmp_path).split("\n")[:2] == ["refused: True", "recorded 2"]
    assert bodies(tmp_path / "a.yaml") == [b"first", b"second"]


def test_a_fork_that_leaves_the_block_does_not_close_its_parents_file(tmp_path: Path) -> None:
    """A child that returns through the block closes nothing: journal and lock are its parent's."""
    script = SCRIPT.replace(
        "in_child(child)",
        "pid = os.fork()\n        if pid == 0: raise SystemExit(0)\n        os.waitpid(pid, 0)\n"
        "        print(os.path.exists('a.yaml.lock'), b'state=closed' in open('a.yaml', 'rb').read())",
    )
    assert run(script, tmp_path).split("\n")[:2] == ["True False", "recorded 2"]  # still locked, not closed
    assert bodies(tmp_path / "a.yaml") == [b"first", b"second"]


def test_a_fork_can_open_another_cassette(tmp_path: Path) -> None:
    """This is the remedy."""
    script = SCRIPT.replace('call("child\'s")', 'with aggregator.cassette("b.yaml", "all"): print(call("child\'s"))')
    assert run(script, tmp_path).split("\n")[:2] == ["child's", "recorded 2"]
    assert bodies(tmp_path / "b.yaml") == [b"child's"]


WINDOWS = """
    import os, pathlib
    files = {}
    opened, closed, unlinked, wrote = os.open, os.close, pathlib.Path.unlink, os.write

    def open_file(path, flags, *args, **known):
        assert flags & os.O_BINARY, path
        file = opened(path, flags & ~os.O_BINARY, *args, **known)
        files[file] = os.path.abspath(os.fspath(path))
        return file

    def close_file(file):
        files.pop(file, None)
        closed(file)

    def unlink(self, missing_ok=False):
        if os.path.abspath(self) in files.values():
            raise PermissionError(13, "[WinError 32] The process cannot access the file", str(self))
        unlinked(self, missing_ok)

    os.O_BINARY = 1 << 30
    os.open, os.close, pathlib.Path.unlink = open_file, close_file, unlink
    import aggregator.files
    aggregator.files.fcntl = FCNTL
"""


@pytest.mark.parametrize("locks", ["None", "aggregator.files.fcntl"])
def test_on_windows_every_recording_raised_an_error(locks: str, tmp_path: Path) -> None:
    """No file is unlinked while it is open, and each is opened in binary mode, so that line ends are kept."""
    whole = WINDOWS.replace("FCNTL", locks) + SCRIPT.replace("in_child(child)", "pass")
    assert run(whole, tmp_path).split("\n")[:1] == ["recorded 2"]
    assert bodies(tmp_path / "a.yaml") == [b"first", b"second"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    again = whole.replace('"all"', '"new_episodes"').replace('call("first")', 'call("third")')
    assert run(again, tmp_path).split("\n")[:1] == ["recorded 1"]
    assert sorted(bodies(tmp_path / "a.yaml")) == [b"first", b"second", b"third"]


def test_releasing_a_lock_does_not_remove_the_next_owners_lock(tmp_path: Path) -> None:
    """The name is unlinked before the file is closed."""
    path = tmp_path / "a.yaml"
    for _ in range(3):
        with aggregator.cassette(path, "all") as tape:
            slot = tape.issue(HTTPRequest(url="http://x/", body=b"q", headers={}))
            tape.record(slot, HTTPReply(status=200, body=b"a", headers={}))
            assert (tmp_path / "a.yaml.lock").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["a.yaml"]
