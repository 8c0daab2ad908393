"""The journal survives kills and full disks, and detects every cut and edit."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from aggregator.cassettes.exchanges import Exchange, Facts, encode_line, index_lines
from aggregator.cassettes.journal import OPEN_COMMENT, PREAMBLE, SYNC_LINES, Comment, Journal, Layout, content_hash
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.storage import read, save
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteDamagedError, CassetteError, CassetteRefusedError, CassetteWarning
from aggregator.records import HTTPReply, HTTPRequest

pytestmark = pytest.mark.filterwarnings("ignore::aggregator.errors.CassetteWarning")


def exchange(index: int, reply: bytes = b'{"answer": "yes\\n", "n": 12}') -> Exchange:
    return Exchange(
        request=HTTPRequest(url="https://api.example.com/v1", body=b'{"q": %d}' % index, headers={}),
        reply=HTTPReply(status=200, body=reply, headers={"content-type": "application/json"}),
        facts=Facts(lineage=f"sample={index}", order=index),
    )


def journal_of(path: Path, count: int) -> bytes:
    """Write an open journal."""
    journal = Journal(path)
    for index in range(count):
        journal.extend([encode_line(exchange(index))])
    journal.close()
    return path.read_bytes()


def live(tape: Tape, index: int) -> bytes:
    """Make a call as a client does."""
    slot = tape.issue(exchange(index).request)
    reply = tape.play(slot)
    if reply is None:
        reply = exchange(index).reply
        tape.record(slot, reply)
    return reply.body


def test_a_torn_last_item_is_dropped_and_reported(tmp_path: Path) -> None:
    """An open journal that ends within an item loses only that item, and the finding has its line."""
    path = tmp_path / "a.yaml"
    data = journal_of(path, 3)
    path.write_bytes(data[:-20])
    recording = read(path)
    assert recording is not None
    assert [row.facts.order for row in recording.rows] == [0, 1]
    assert recording.findings == (
        f"{path}: not closed, so it may end early; its 2 exchanges are good",
        f"{path}:6: the last exchange was torn and is dropped",
    )


def test_a_cut_between_items_is_reported(tmp_path: Path) -> None:
    """An open journal cut between two items is reported as not closed."""
    path = tmp_path / "a.yaml"
    data = journal_of(path, 3)
    path.write_bytes(data[: data[:-1].rindex(b"\n") + 1])
    recording = read(path)
    assert recording is not None
    assert (len(recording.rows), recording.state) == (2, "open")
    assert "not closed" in recording.findings[0]


def test_an_edit_is_an_error_with_its_line(tmp_path: Path) -> None:
    """A changed byte in any item but a torn last one is damage with its line."""
    path = tmp_path / "a.yaml"
    path.write_bytes(journal_of(path, 3).replace(b'{\\"q\\": 1}', b'{\\"q\\": 7}'))
    with pytest.raises(CassetteDamagedError, match=r"a\.yaml:5"):
        read(path)


@pytest.mark.parametrize("layout", ["journal", "readable"])
def test_an_edit_of_a_closed_file_is_an_error_with_its_line(tmp_path: Path, layout: Layout) -> None:
    """In a closed file of either layout, the edited exchange is reported with its line."""
    path = tmp_path / "a.yaml"
    save(path, tuple(index_lines(encode_line(exchange(index)) for index in range(3))), layout)
    lines = path.read_bytes().splitlines(keepends=True)
    index = next(number for number, line in enumerate(lines) if b"1}" in line and b"q" in line)
    lines[index] = lines[index].replace(b"1}", b"7}", 1)
    path.write_bytes(b"".join(lines))
    start = max(number for number, line in enumerate(lines[: index + 1], 1) if line.startswith(b"- "))
    with pytest.raises(CassetteDamagedError, match=rf"a\.yaml:{start};"):
        read(path)


def test_crlf_line_ends_are_not_damage(tmp_path: Path) -> None:
    """A checkout that changed line ends to CRLF reads the same."""
    path = tmp_path / "a.yaml"
    save(path, tuple(index_lines([encode_line(exchange(0, b"two\nlines"))])), "readable")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    recording = read(path)
    assert recording is not None
    assert recording.rows[0].exchange().reply.body == b"two\nlines"
    assert recording.findings == ()


def damage(data: bytes, seed: int) -> tuple[bytes, str]:
    """Cut or edit a file at random."""
    draw = random.Random(seed)
    start = draw.randrange(len(data))
    kind = draw.choice(["cut the end", "cut a hole", "change a byte", "insert", "cut the start", "cut at a line"])
    if kind == "cut the end":
        return data[:start], kind
    if kind == "cut the start":
        return data[start + 1 :], kind
    if kind == "cut a hole":
        return data[:start] + data[start + draw.randint(1, 300) :], kind
    if kind == "insert":
        return data[:start] + draw.choice([b"x", b"\n", b" ", b"# note\n", b'"']) + data[start:], kind
    if kind == "cut at a line":
        return data[: data.find(b"\n", start) + 1], kind
    return data[:start] + bytes([data[start] ^ (1 << draw.randrange(7))]) + data[start + 1 :], kind


def silent(data: bytes, path: Path, count: int) -> bool:
    """Return True if a damaged file is read without an error or a finding."""
    path.write_bytes(data)
    try:
        recording = read(path)
    except (CassetteDamagedError, CassetteRefusedError):
        return False
    assert recording is not None
    got = [bytes(row.line) for row in recording.rows]
    truth = [encode_line(exchange(index)) for index in range(count)]
    told = bool(recording.findings) or (recording.state == "closed" and got == truth)
    return not told or got != truth[: len(got)]


def sweep(tmp_path: Path, seeds: range) -> list[str]:
    """Damage all three kinds of file and return those that were not detected."""
    rows = tuple(index_lines(encode_line(exchange(index)) for index in range(6)))
    files = {"open": journal_of(tmp_path / "open.yaml", 6)}
    for layout in ("journal", "readable"):
        save(tmp_path / f"{layout}.yaml", rows, layout)
        files[layout] = (tmp_path / f"{layout}.yaml").read_bytes()
    missed = []
    for name, good in files.items():
        for seed in seeds:
            data, kind = damage(good, seed)
            if data != good and silent(data, tmp_path / "damaged.yaml", 6):
                missed.append(f"{name}, seed {seed}: {kind}")
    return missed


def test_no_damage_goes_undetected(tmp_path: Path) -> None:
    """A random cut or edit of any kind of file gives an error or a finding."""
    assert sweep(tmp_path, range(150)) == []


@pytest.mark.long
def test_no_damage_goes_undetected_in_thousands(tmp_path: Path) -> None:
    """1,000 cuts and edits of each kind of file are detected."""
    assert sweep(tmp_path, range(1000, 2000)) == []


RECORD = """
import sys
from aggregator.cassettes.recorder import open_tape
from aggregator.records import HTTPReply, HTTPRequest
tape = open_tape(sys.argv[1], sys.argv[2])
for index in range(100_000):
    slot = tape.issue(HTTPRequest(url="https://api.example.com/v1", body=b'{"q": %d}' % index, headers={}))
    tape.record(slot, HTTPReply(status=200, body=b"answer %d " % index * 50, headers={}))
    sys.stdout.buffer.write(b"%d\\n" % index)
    sys.stdout.buffer.flush()
"""


def killed(path: Path, mode: str, after: int) -> int:
    """Kill a recording process and return how many answers it had used."""
    with subprocess.Popen([sys.executable, "-c", RECORD, str(path), mode], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
    return after + rest.count(b"\n")


def kill_and_count(path: Path, after: int) -> tuple[int, int]:
    """Return how many answers were used before the kill, and how many the journal kept."""
    used = killed(path, "once", after)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tape = open_tape(path, "none")
        kept = len(tape.unplayed())
        tape.close()
    return used, kept


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    """After a SIGKILL while recording, every used answer is in the journal, and the run continues from there."""
    path = tmp_path / "a.yaml"
    used, kept = kill_and_count(path, 40)
    assert used <= kept <= used + 1
    tape = open_tape(path, "once")
    assert live(tape, 0) == b"answer 0 " * 50
    assert live(tape, kept) == exchange(kept).reply.body
    tape.close()
    recording = read(path)
    assert recording is not None
    assert (recording.state, len(recording.rows)) == ("closed", kept + 1)


@pytest.mark.long
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    """Kills at 100 different moments lose nothing."""
    for index in range(100):
        used, kept = kill_and_count(tmp_path / f"{index}.yaml", 1 + index * 7)
        assert used <= kept <= used + 1


def test_a_killed_rerecording_leaves_the_cassette(tmp_path: Path) -> None:
    """A SIGKILL while a finished cassette is re-recorded or extended leaves it unchanged."""
    path = tmp_path / "a.yaml"
    save(path, tuple(index_lines([encode_line(exchange(10**9))])))
    before = path.read_bytes()
    killed(path, "all", 5)
    assert path.read_bytes() == before
    used = killed(path, "new_episodes", 5)
    assert path.read_bytes() == before
    tape = open_tape(path, "new_episodes")
    assert live(tape, used - 1) == b"answer %d " % (used - 1) * 50
    tape.close()
    assert not (tmp_path / "a.yaml.part").exists()
    recording = read(path)
    assert recording is not None
    assert used < len(recording.rows) <= used + 2


def test_the_device_is_synced_at_the_given_interval(tmp_path: Path) -> None:
    """fsync is called every so many lines."""
    times: list[float] = []

    def clock() -> float:
        times.append(0.0)
        return 0.0

    journal = Journal(tmp_path / "a.yaml", clock=clock)
    for index in range(2 * SYNC_LINES):
        journal.extend([encode_line(exchange(index))])
    assert len(times) == 1 + 2 + 2 * (SYNC_LINES - 1)
    journal.close()


class FullDisk:
    """A disk with space for a number of writes; the next one is cut short."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, file: int, data: bytes) -> int:
        if self.room == 0:
            self.room = -1
            return os.write(file, data[:10])
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        return os.write(file, data)


def test_a_full_disk_keeps_the_answer_and_fails_the_run(tmp_path: Path) -> None:
    """Nothing half-written is left, the answer is kept in memory, and the run fails with the reason."""
    path, disk = tmp_path / "a.yaml", FullDisk(room=1)
    journal = Journal(path, write=disk)
    tape = Tape(sink=journal)
    live(tape, 0)
    with pytest.raises(CassetteError, match="No space left on device"):
        live(tape, 1)
    assert [one.reply.body for one in tape.unsaved] == [exchange(1).reply.body]
    assert len(path.read_bytes().splitlines()) == 4
    with pytest.raises(CassetteError, match="No space left on device"):
        tape.close()
    journal.close()


def test_pending_answers_are_written_once_there_is_space(tmp_path: Path) -> None:
    """They are written before later ones, in order."""
    path, disk = tmp_path / "a.yaml", FullDisk(room=1)
    journal = Journal(path, write=disk)
    tape = Tape(sink=journal)
    live(tape, 0)
    with pytest.raises(CassetteError):
        live(tape, 1)
    disk.room = 10
    live(tape, 2)
    journal.close()
    recording = read(path)
    assert recording is not None
    assert [row.exchange().request.body for row in recording.rows] == [b'{"q": 0}', b'{"q": 1}', b'{"q": 2}']


def test_an_unwritable_folder_is_reported_first(tmp_path: Path) -> None:
    """A folder that cannot be created is an error before a model is called."""
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CassetteError, match="Expected to record into .*; make the folder writable"):
        open_tape(tmp_path / "file" / "a.yaml", "once")


def test_an_empty_file_is_damage(tmp_path: Path) -> None:
    """An empty file is neither a cassette nor a missing one."""
    (tmp_path / "a.yaml").touch()
    for mode in ("none", "once", "new_episodes"):
        with pytest.raises(CassetteDamagedError, match="empty file; delete it"):
            open_tape(tmp_path / "a.yaml", mode)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A cassette of a newer format requires a newer library."""
    path = tmp_path / "a.yaml"
    path.write_bytes(OPEN_COMMENT.replace(b"format=1", b"format=2") + PREAMBLE)
    with pytest.raises(CassetteRefusedError, match="Expected format 1 .* got 2; .*upgrade"):
        read(path)
    path.write_text("version: 3\ninteractions: []\n")
    with pytest.raises(CassetteRefusedError, match="got version 3"):
        read(path)


def test_a_foreign_line_in_a_journal_is_damage(tmp_path: Path) -> None:
    """The error for a journal with a valid hash but another tool's items says what was expected."""
    content = PREAMBLE + b'- {"request":{},"response":{},"x":{}}\n'
    comment = Comment(layout="journal", exchanges=1, sha256=content_hash(content))
    (tmp_path / "a.yaml").write_bytes(comment.render() + content)
    with pytest.raises(CassetteDamagedError, match="got a line without request, response and the facts in x"):
        read(tmp_path / "a.yaml")


def test_discarding_restores_the_previous_state(tmp_path: Path) -> None:
    """A discarded recording leaves no file, or the previous file."""
    path = tmp_path / "a.yaml"
    tape = open_tape(path, "once")
    live(tape, 0)
    tape.discard()
    tape.close()
    assert list(tmp_path.iterdir()) == []
    save(path, tuple(index_lines([encode_line(exchange(0))])))
    before = path.read_bytes()
    tape = open_tape(path, "new_episodes")
    live(tape, 1)
    tape.discard()
    with pytest.warns(CassetteWarning, match="not played"):
        tape.close()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.yaml": before}


def test_a_full_disk_at_the_first_line_left_a_journal_without_its_head(tmp_path: Path) -> None:
    """Comment and preamble are written with the first exchange, however often the disk refuses it."""
    path, disk = tmp_path / "a.yaml", FullDisk(room=0)
    journal = Journal(path, write=disk)
    tape = Tape(sink=journal)
    with pytest.raises(CassetteError, match="No space left on device"):
        live(tape, 0)
    disk.room = 10
    live(tape, 1)
    journal.close()
    recording = read(path)
    assert recording is not None
    assert [row.exchange().request.body for row in recording.rows] == [b'{"q": 0}', b'{"q": 1}']


def test_a_disk_without_space_leaves_no_file(tmp_path: Path) -> None:
    """An empty file would be reported as damage."""
    journal = Journal(tmp_path / "a.yaml", write=FullDisk(room=0))
    with pytest.raises(CassetteError):
        journal.extend([b"{}"])
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_fsync_wrote_an_exchange_twice(tmp_path: Path) -> None:
    """The kernel has the lines, once each; closing reports that the device did not sync them."""
    path = tmp_path / "a.yaml"

    def failing(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    times = iter(range(0, 10_000, 5))
    journal = Journal(path, clock=lambda: next(times), flush=failing)
    tape = Tape(sink=journal, on_close=lambda _: journal.close())
    live(tape, 0)
    live(tape, 1)
    with pytest.raises(CassetteError, match="Expected the device to keep .* Input/output error; the disk may be fail"):
        tape.close()
    recording = read(path)
    assert recording is not None
    assert [row.exchange().request.body for row in recording.rows] == [b'{"q": 0}', b'{"q": 1}']
