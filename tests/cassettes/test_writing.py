"""Writing answers to the disk: together, in order, each with its own result; and late arrivals."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from aggregator.cassettes.exchanges import Row, index_lines
from aggregator.cassettes.journal import Journal
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.storage import read
from aggregator.cassettes.tape import Tape
from aggregator.cassettes.writing import Entry
from aggregator.errors import APIConnectionError, CassetteError, CassetteWarning, SecretLeakError
from aggregator.records import HTTPReply, HTTPRequest

URL = "https://api.example.com/v1/chat/completions"
KEY = "sk-0123456789abcdef0123456789abcdef"


class Memory:
    """A sink that keeps each write separately."""

    def __init__(self) -> None:
        self.pieces: list[tuple[bytes, ...]] = []

    def extend(self, lines: Sequence[bytes], /) -> None:
        self.pieces.append(tuple(lines))

    @property
    def rows(self) -> list[Row]:
        return list(index_lines(line for piece in self.pieces for line in piece))


def ask(text: str, **options: object) -> HTTPRequest:
    return HTTPRequest(url=URL, body=f'{{"q":"{text}"}}'.encode(), headers={}, **options)  # type: ignore[arg-type]


def answer(text: str) -> HTTPReply:
    return HTTPReply(status=200, body=text.encode(), headers={"content-type": "application/json"})


def hand_in(tape: Tape, *texts: str) -> list[Entry]:
    """Issue calls in this order, and submit their answers in reverse."""
    slots = [(tape.issue(ask(text)), answer(f"to {text}")) for text in texts]
    return [tape.hand_in(slot, reply)[0] for slot, reply in reversed(slots)][::-1]


def test_pending_answers_are_written_together() -> None:
    """Nothing is written before the flush, then everything at once; only the first answer requests a flush."""
    sink = Memory()
    tape = Tape(sink=sink)
    slots = [tape.issue(ask(text)) for text in "abc"]
    handed = [tape.hand_in(slot, answer("x")) for slot in slots]
    assert [is_first for _, is_first in handed] == [True, False, False]
    assert (sink.pieces, tape.recorded) == ([], 0)
    tape.flush()
    assert ([len(piece) for piece in sink.pieces], tape.recorded) == ([3], 3)
    assert all(entry.is_done and entry.error is None for entry, _ in handed)


def test_finishing_one_answer_writes_it() -> None:
    """A caller that waits for a pending answer writes it, and the others pending."""
    sink = Memory()
    tape = Tape(sink=sink)
    first, second = hand_in(tape, "a", "b")
    tape.finish(second)
    assert first.is_done
    assert [len(piece) for piece in sink.pieces] == [2]


def test_tickets_follow_the_order_of_issue_although_they_are_numbered_late() -> None:
    """Identical calls are numbered in the order of issue, including those without an answer."""
    sink = Memory()
    tape = Tape(sink=sink)
    with lineage("sample=1"):
        slots = [tape.issue(ask("same")) for _ in range(4)]
    for index in (2, 0):
        tape.hand_in(slots[index], answer(f"answer {index}"))
    tape.flush()
    tape.record(slots[3], answer("answer 3"))
    found = {row.facts.ticket: (row.facts.order, row.reply().body) for row in sink.rows}
    assert found == {0: (0, b"answer 0"), 2: (2, b"answer 2"), 3: (3, b"answer 3")}


def test_requests_that_differ_in_a_secret_only_share_their_tickets() -> None:
    """A ticket counts requests as written; among those that are equal then, each finds its own answer first."""
    sink = Memory()
    tape = Tape(sink=sink)
    bodies = [b'{"q":1,"api_key":"%b"}' % key for key in (b"first-key-of-mine", b"second-key-of-mine")]
    requests = [HTTPRequest(url=URL, body=body, headers={}) for body in bodies]
    slots = [tape.issue(request) for request in requests]
    for index in (1, 0):
        tape.hand_in(slots[index], answer(f"answer {index}"))
    tape.flush()
    assert b"key-of-mine" not in b"".join(sink.pieces[0])
    replay = Tape(sink.rows)
    played = [replay.play(replay.issue(request)) for request in reversed(requests)]
    assert [reply and reply.body for reply in played] == [b"answer 1", b"answer 0"]
    replay = Tape(sink.rows)
    others = [HTTPRequest(url=URL, body=b'{"q":1,"api_key":"key-%d"}' % index, headers={}) for index in range(2)]
    played = [replay.play(replay.issue(request)) for request in (others[0], requests[0])]
    assert [reply and reply.body for reply in played] == [b"answer 0", b"answer 1"]


def test_a_secret_in_one_answer_refuses_only_that_one() -> None:
    """An answer that cannot be redacted is kept in memory; the others are written."""
    sink = Memory()
    tape = Tape(sink=sink)
    with lineage(f"sample-{KEY}"):
        leaking = tape.issue(ask("a", secrets=(KEY,)))
    entries = [tape.hand_in(leaking, answer("x"))[0], *hand_in(tape, "b", "c")]
    tape.flush()
    assert [type(entry.error) for entry in entries] == [SecretLeakError, type(None), type(None)]
    assert [row.reply().body for row in sink.rows] == [b"to c", b"to b"]
    assert [exchange.reply.body for exchange in tape.unsaved] == [b"x"]
    with pytest.raises(SecretLeakError):
        tape.finish(entries[0])
    tape.finish(entries[1])


@pytest.mark.parametrize("hidden", ["reply", "request"])
def test_a_secret_is_found_among_clean_answers(hidden: str) -> None:
    """One quick search over all pending answers finds what a search of each would find."""
    sink = Memory()
    tape = Tape(sink=sink)
    for index in range(8):
        text = f"Bearer {KEY}" if index == 5 else "prose"
        asked, answered = (text, "prose") if hidden == "request" else ("prose", text)
        tape.hand_in(tape.issue(ask(asked)), answer(answered))
    tape.flush()
    written = b"".join(sink.pieces[0])
    assert (KEY.encode() in written, written.count(b"REDACTED")) == (False, 1)


class SmallDisk:
    """A disk on which a write above a number of bytes fails."""

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def __call__(self, file: int, data: bytes) -> int:
        if len(data) > self.largest:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.largest -= len(data)
        return os.write(file, data)


def test_a_full_disk_gets_as_many_as_fit(tmp_path: Path) -> None:
    """Answers that fit are written in order; the others are reported, kept, and written once there is space."""
    path, disk = tmp_path / "a.yaml", SmallDisk(10**6)
    journal = Journal(path, write=disk)
    tape = Tape(sink=journal)
    tape.record(tape.issue(ask("0")), answer("to 0"))
    line = path.stat().st_size - len(path.read_bytes().split(b"- {", 1)[0])
    disk.largest = 2 * line + line // 2
    entries = hand_in(tape, "1", "2", "3")[::-1]
    tape.flush()
    assert [entry.error is None for entry in entries] == [True, True, False]
    with pytest.raises(CassetteError, match="No space left on device"):
        tape.finish(entries[2])
    assert [exchange.reply.body for exchange in tape.unsaved] == [b"to 1"]
    disk.largest = 10**6
    tape.record(tape.issue(ask("4")), answer("to 4"))
    journal.close()
    recording = read(path)
    assert recording is not None
    assert [row.reply().body for row in recording.rows] == [b"to 0", b"to 3", b"to 2", b"to 1", b"to 4"]
    with pytest.raises(CassetteError, match="No space left on device"):
        tape.close()


def test_threads_submit_and_finish_concurrently() -> None:
    """Several event loops may share a tape: every answer is written once, none is lost, tickets have no gaps."""
    sink = Memory()
    tape = Tape(sink=sink)

    def work() -> None:
        for _ in range(50):
            tape.finish(tape.hand_in(tape.issue(ask("same")), answer("x"))[0])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.facts.ticket for row in sink.rows) == list(range(400))
    assert tape.recorded == 400


def test_an_answer_that_arrived_late_damaged_the_finished_file(tmp_path: Path) -> None:
    """An answer after the cassette was closed is refused and kept; the finished file does not change."""
    path = tmp_path / "a.yaml"
    tape = open_tape(path, "all", layout="journal")
    tape.record(tape.issue(ask("in time")), answer("x"))
    late = tape.issue(ask("late"))
    tape.close()
    finished = path.read_bytes()
    with pytest.raises(CassetteError, match=r"got an answer after it was left; await the tasks"):
        tape.record(late, answer("y"))
    assert (path.read_bytes(), [exchange.reply.body for exchange in tape.unsaved]) == (finished, [b"y"])


def test_a_late_call_is_refused_before_it_is_paid_for(tmp_path: Path) -> None:
    """A closed tape does not allow a live call that it could not record."""
    tape = open_tape(tmp_path / "a.yaml", "all")
    tape.close()
    with pytest.raises(CassetteError, match="got a call after it was left"):
        tape.play(tape.issue(ask("late")))


def test_a_finished_journal_accepts_no_line(tmp_path: Path) -> None:
    """Appending to a closed journal is an error, and does not change the file."""
    journal = Journal(tmp_path / "a.yaml")
    journal.extend([b"{}"])
    journal.close()
    before = (tmp_path / "a.yaml").read_bytes()
    with pytest.raises(CassetteError, match="one that is finished"):
        journal.extend([b"{}"])
    assert (tmp_path / "a.yaml").read_bytes() == before


@pytest.mark.parametrize("place", ["failure", "reason", "request"])
def test_one_exchange_that_cannot_be_written_blocked_the_tape(place: str) -> None:
    """A custom transport may answer anything: that call gets the error, and the others are written."""
    sink = Memory()
    tape = Tape(sink=sink)
    asked = ask("odd") if place != "request" else HTTPRequest(url=URL, body=b"{}", headers={"accept": 1})  # type: ignore[dict-item]
    odd = answer("x") if place != "reason" else HTTPReply(status=200, body=b"x", headers={}, reason=None)  # type: ignore[arg-type]
    failure = APIConnectionError("lone \udcff") if place == "failure" else None
    slots = [tape.issue(ask("a")), tape.issue(asked), tape.issue(ask("b"))]
    entries = [
        tape.hand_in(slot, reply, failure=error)[0]
        for slot, reply, error in zip(slots, (answer("1"), odd, answer("2")), (None, failure, None), strict=True)
    ]
    tape.flush()
    tape.finish(entries[0])
    tape.finish(entries[2])
    with pytest.raises(CassetteError, match="Expected an exchange that can be written, got"):
        tape.finish(entries[1])
    assert [row.reply().body for row in sink.rows] == [b"1", b"2"]
    tape.record(tape.issue(ask("later")), answer("3"))
    assert tape.recorded == 3


def test_closing_waits_for_writes_of_other_threads(tmp_path: Path) -> None:
    """If a tape is closed or discarded while others record, each of their calls gets an error with the reason."""
    for discards in (False, True):
        tape = open_tape(tmp_path / "a.yaml", "all")
        errors: list[BaseException] = []

        def work(tape: Tape, errors: list[BaseException]) -> None:
            try:
                while True:
                    tape.record(tape.issue(ask("same")), answer("x"))
            except BaseException as ended:  # noqa: BLE001 - whatever it is, the test looks at it
                errors.append(ended)

        threads = [threading.Thread(target=work, args=(tape, errors)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while tape.recorded < 20:
            pass
        if discards:
            tape.discard()
        tape.close()
        for thread in threads:
            thread.join()
        assert [type(error) for error in errors] == [CassetteError] * 4
        assert all("after it was left" in str(error) for error in errors)
        assert (tmp_path / "a.yaml").exists()
    recording = read(tmp_path / "a.yaml")
    assert recording is not None
    assert len(recording.rows) >= 20


LARGE_BODY = json.dumps({"text": "some words of an answer " * 400_000, "api_key": "x9Kp21-7fQz"}).encode()


async def test_a_large_answer_blocked_the_event_loop() -> None:
    """It is redacted in a thread, while other tasks run; the result is the same."""
    sink = Memory()
    tape = Tape(sink=sink)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())  # noqa: TID251 - it ends with the test
    slot = tape.issue(ask("large"))
    await tape.arecord(slot, HTTPReply(status=200, body=LARGE_BODY, headers={}))
    counting.cancel()
    assert turns > 3
    inline = Tape(sink=(other := Memory()))
    inline.record(inline.issue(ask("large")), HTTPReply(status=200, body=LARGE_BODY, headers={}))
    assert [row.reply().body for row in sink.rows] == [row.reply().body for row in other.rows]
    assert b"x9Kp21" not in b"".join(sink.pieces[0])
    with pytest.warns(CassetteWarning, match="1 recorded answers were changed"):
        tape.close()


async def test_a_large_answer_of_a_cancelled_call_is_written() -> None:
    """It was paid for, so cancelling the wait for the thread does not lose it."""
    sink = Memory()
    tape = Tape(sink=sink)
    task = asyncio.create_task(  # noqa: TID251 - it is awaited below
        tape.arecord(tape.issue(ask("large")), HTTPReply(status=200, body=LARGE_BODY, headers={}))
    )
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    tape.close(warn=False)
    (row,) = sink.rows
    assert b"x9Kp21" not in row.line
    assert json.loads(row.reply().body)["api_key"] == "REDACTED"


async def test_a_large_answer_that_cannot_be_redacted_is_refused() -> None:
    """An authentication value in a compressed body: the caller gets the error, as for a small answer."""
    tape = Tape(sink=Memory())
    body = gzip.compress(random.Random(1).randbytes(150_000).hex().encode() + KEY.encode())
    with pytest.raises(SecretLeakError):
        await tape.arecord(tape.issue(ask("a", secrets=(KEY,))), HTTPReply(status=200, body=body, headers={}))
