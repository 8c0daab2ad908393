"""Files are written completely or not at all, and only their owner can read them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from aggregator.files import make_folder, open_file, write_atomically

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")


def permissions(path: Path) -> str:
    return f"{path.stat().st_mode & 0o777:o}"


@pytest.fixture(autouse=True)
def _umask() -> None:
    os.umask(0o022)


def test_a_new_file_and_its_new_folders_are_private(tmp_path: Path) -> None:
    """The file gets 0600 and every folder created for it 0700."""
    path = tmp_path / "run" / "inner" / "state.json"
    write_atomically(path, b"{}")
    assert [permissions(p) for p in (path, path.parent, path.parent.parent)] == ["600", "700", "700"]
    assert path.read_bytes() == b"{}"


def test_a_shared_file_follows_the_umask(tmp_path: Path) -> None:
    """With private=False the umask decides, as for any other file."""
    path = tmp_path / "fixtures" / "state.json"
    write_atomically(path, b"", private=False)
    assert [permissions(path), permissions(path.parent)] == ["644", "755"]


def test_an_existing_file_keeps_its_permissions(tmp_path: Path) -> None:
    """Writing a file again does not change the owner's permissions."""
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert (permissions(path), path.read_bytes()) == ("640", b"new")


def test_a_link_is_followed(tmp_path: Path) -> None:
    """Writing through a link replaces its target, and the link is kept."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "state.json")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "state.json").read_bytes() == b"new"


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    """An error during the write removes the temporary file."""
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"state.json": b"old"}


def test_a_sole_writer_replaces_a_killed_process_file(tmp_path: Path) -> None:
    """A torn temporary file is replaced, and nothing of it remains."""
    path = tmp_path / "state.json"
    (tmp_path / "state.json.tmp").write_bytes(b"torn")
    write_atomically(path, b"new", sole_writer=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"state.json": b"new"}


def test_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
    """Each writer has its own temporary file."""
    path, contents = tmp_path / "state.json", [bytes([65 + i]) * 50_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path_and_an_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare file name is in the working folder; an existing folder keeps its permissions."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    write_atomically("state.json", b"1")
    make_folder("")
    make_folder(tmp_path)
    assert permissions(tmp_path) == "755"
    os.close(open_file("journal.jsonl", os.O_CREAT | os.O_WRONLY))
    assert permissions(tmp_path / "journal.jsonl") == "600"
