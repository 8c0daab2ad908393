"""The tape: slots, attempts, lineage, misses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from aggregator.cassettes.exchanges import encode_line, index_lines
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.tape import NO_ANSWER, Tape
from aggregator.errors import APIConnectionError, APITimeoutError, CassetteError, CassetteMissError, CassetteWarning
from aggregator.records import HTTPReply, HTTPRequest, Usage

URL = "https://api.example.com/v1/chat/completions"


class Memory:
    """A sink that keeps lines in memory."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def extend(self, lines: Iterable[bytes], /) -> None:
        self.lines.extend(lines)


def ask(text: str = "hi") -> HTTPRequest:
    return HTTPRequest(url=URL, body=b'{"messages":[{"content":"%b"}]}' % text.encode(), headers={})


def answer(text: str, status: int = 200) -> HTTPReply:
    return HTTPReply(status=status, body=text.encode(), headers={"content-type": "application/json"})


def played(tape: Tape, request: HTTPRequest) -> str:
    reply = tape.play(tape.issue(request))
    assert reply is not None
    assert reply.replayed
    return reply.body.decode()


def again(sink: Memory, **options: object) -> Tape:
    return Tape(tuple(index_lines(sink.lines)), **options)  # type: ignore[arg-type]


def test_calls_of_a_lineage_lost_it_after_an_identical_call_without_one() -> None:
    """Live calls without a lineage do not affect later calls with one, in any order."""
    sink = Memory()
    tape = Tape(sink=sink)
    for place in ("", "sample=1", "sample=2"):
        with lineage(*filter(None, [place])):
            tape.record(tape.issue(ask()), answer(place))
    replay = again(sink)
    for place in ("sample=2", "", "sample=1"):
        with lineage(*filter(None, [place])):
            assert played(replay, ask()) == place


def test_tickets_follow_issue_not_arrival() -> None:
    """Identical requests replay their own answers, although the answers came in another order."""
    sink = Memory()
    tape = Tape(sink=sink)
    slots = [tape.issue(ask()) for _ in range(3)]
    for index in (2, 0, 1):
        assert tape.play(slots[index]) is None
        tape.record(slots[index], answer(f"answer {index}"))
    replay = again(sink)
    assert [played(replay, ask()) for _ in range(3)] == ["answer 0", "answer 1", "answer 2"]
    replay.close()


def test_what_was_just_recorded_is_not_played() -> None:
    """A second identical request is sent live, so n samples are n samples."""
    tape = Tape(sink=Memory())
    tape.record(tape.issue(ask()), answer("first"))
    assert tape.play(tape.issue(ask())) is None


def test_attempts_play_in_order() -> None:
    """A 429, a failed connection, a timeout and then an answer are replayed in this order."""
    sink = Memory()
    tape = Tape(sink=sink)
    slot = tape.issue(ask())
    tape.record(slot, answer("slow down", 429))
    tape.record(slot, NO_ANSWER, failure=APIConnectionError("reset"))
    tape.record(slot, NO_ANSWER, failure=APITimeoutError("late"))
    tape.record(slot, answer("fine"), usage=Usage(input_tokens=3), model="m")
    replay = again(sink)
    slot = replay.issue(ask())
    first = replay.play(slot)
    assert first is not None
    assert (first.status, first.body) == (429, b"slow down")
    with pytest.raises(APIConnectionError, match="^reset$") as caught:
        replay.play(slot)
    assert not isinstance(caught.value, APITimeoutError)
    with pytest.raises(APITimeoutError, match="^late$"):
        replay.play(slot)
    last = replay.play(slot)
    assert last is not None
    assert last.body == b"fine"


def test_lineage_distinguishes_identical_requests() -> None:
    """The same request in two lineages plays what each of them recorded, in any order."""
    sink = Memory()
    tape = Tape(sink=sink)
    for name in ("sample=0", "sample=1"):
        with lineage(name):
            tape.record(tape.issue(ask()), answer(name))
    replay = again(sink)
    for name in ("sample=1", "sample=0"):
        with lineage(name):
            assert played(replay, ask()) == name


def test_strict_lineage_never_guesses() -> None:
    """A recorded lineage must match; another one is a miss."""
    sink = Memory()
    tape = Tape(sink=sink)
    with lineage("here"):
        tape.record(tape.issue(ask()), answer("a"))
    replay = again(sink)
    with lineage("there"), pytest.raises(CassetteMissError, match="there"):
        replay.play(replay.issue(ask()))


def test_preferred_lineage_falls_back_with_a_report() -> None:
    """lineage="prefer" plays another lineage's answers in canonical order, each once, and reports it."""
    sink = Memory()
    tape = Tape(sink=sink)
    for name in ("one", "two"):
        with lineage(name):
            tape.record(tape.issue(ask()), answer(name))
    replay = again(sink, rules=TapeRules(lineage="prefer"))
    with lineage("other"):
        assert played(replay, ask()) == "one"
    with lineage("more"):
        assert played(replay, ask()) == "two"
    with pytest.warns(CassetteWarning, match="2 calls played what another lineage recorded"):
        replay.close()
    assert len(replay.report) == 1


def test_a_renamed_lineage_used_another_ones_answer() -> None:
    """With lineage="prefer" both get an answer, in any order."""
    sink = Memory()
    tape = Tape(sink=sink)
    for name in ("a", "c"):
        with lineage(name):
            tape.record(tape.issue(ask()), answer(name))
    for order in (("renamed", "a"), ("a", "renamed")):
        replay = again(sink, rules=TapeRules(lineage="prefer"))
        found = []
        for name in order:
            with lineage(name):
                found.append(played(replay, ask()))
        assert found == ["a", "c"]


def test_a_call_recorded_after_a_fallback_keeps_its_ticket() -> None:
    """A call recorded after one that played another lineage's answer is the second one in a replay, too."""
    sink = Memory()
    tape = Tape(sink=sink)
    with lineage("before"):
        tape.record(tape.issue(ask()), answer("one"))
    adding = Tape(tuple(index_lines(sink.lines)), rules=TapeRules(lineage="prefer"), sink=sink)
    with lineage("renamed"):
        assert played(adding, ask()) == "one"
        slot = adding.issue(ask())
        assert adding.play(slot) is None
        adding.record(slot, answer("two"))
    replay = again(sink, rules=TapeRules(lineage="prefer"))
    with lineage("renamed"):
        assert [played(replay, ask()), played(replay, ask())] == ["one", "two"]


def test_calls_that_differ_in_an_ignored_field_became_attempts_of_one() -> None:
    """A cassette recorded without `ignore` plays with it: tickets are counted again, in the order of issue."""
    sink = Memory()
    tape = Tape(sink=sink)
    requests = [HTTPRequest(url=URL, body=b'{"q":1,"user":%d}' % index, headers={}) for index in range(3)]
    slots = [tape.issue(request) for request in requests]
    for index in (2, 0, 1):
        tape.record(slots[index], answer(f"answer {index}", 500 if index == 0 else 200))
    ignore = (("user",),)
    replay = Tape(tuple(index_lines(sink.lines)), rules=TapeRules(ignore=ignore))
    replies = [replay.play(replay.issue(request)) for request in reversed(requests)]
    assert [reply and reply.body for reply in replies] == [b"answer 0", b"answer 1", b"answer 2"]


def test_recordings_without_lineage_play_in_issue_order() -> None:
    """Exchanges recorded without a lineage play for every lineage, in the order of issue."""
    sink = Memory()
    tape = Tape(sink=sink)
    for text in ("a", "b"):
        tape.record(tape.issue(ask()), answer(text))
    replay = again(sink)
    with lineage("x"):
        assert played(replay, ask()) == "a"
    with lineage("y"):
        assert played(replay, ask()) == "b"


def test_a_caught_miss_is_raised_again_at_close() -> None:
    """`except Exception` in agent code cannot hide a miss."""
    tape = Tape()
    with pytest.raises(CassetteMissError):
        tape.play(tape.issue(ask()))
    with pytest.raises(CassetteMissError) as caught:
        tape.close()
    assert caught.value.__cause__ is tape.misses[0]
    tape.close()


def test_unplayed_exchanges_are_counted() -> None:
    """Closing reports how many recorded exchanges were not requested."""
    sink = Memory()
    tape = Tape(sink=sink)
    for text in ("a", "b"):
        tape.record(tape.issue(ask(text)), answer(text))
    replay = again(sink)
    assert played(replay, ask("b")) == "b"
    assert [row.exchange().reply.body for row in replay.unplayed()] == [b"a"]
    with pytest.warns(CassetteWarning, match="1 of 2 recorded exchanges were not played"):
        replay.close()


def test_a_playing_tape_does_not_record() -> None:
    """Recording on a tape that only plays is an error, so that no answer is lost."""
    tape = Tape()
    with pytest.raises(CassetteError, match="only plays"):
        tape.record(tape.issue(ask()), answer("a"))


def test_key_order_and_white_space_are_ignored(tmp_path: Path) -> None:
    """A body with other key order and spacing finds the recorded answer."""
    sink = Memory()
    tape = Tape(sink=sink)
    request = HTTPRequest(url=URL, body=b'{"a":1,"b":[2]}', headers={})
    tape.record(tape.issue(request), answer("x"))
    replay = again(sink)
    assert played(replay, HTTPRequest(url=URL, body=b'{"b": [2], "a": 1}', headers={})) == "x"


SPELLINGS = (b'{"a":1,"b":2}', b'{"b":2,"a":1}', b'{"a": 1, "b": 2}')


@pytest.mark.parametrize("asked", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 0), (1, 2)])
def test_two_spellings_of_one_request_share_their_tickets(asked: tuple[int, int]) -> None:
    """Answers come in the order of issue, however the request was written when recorded and when asked."""
    sink = Memory()
    tape = Tape(sink=sink)
    for index in (0, 1):
        request = HTTPRequest(url=URL, body=SPELLINGS[index], headers={})
        tape.record(tape.issue(request), answer(f"answer {index}"))
    replay = again(sink)
    requests = [HTTPRequest(url=URL, body=SPELLINGS[index], headers={}) for index in asked]
    assert [played(replay, request) for request in requests] == ["answer 0", "answer 1"]
    replay.close()


def test_another_spelling_in_between_does_not_change_tickets() -> None:
    """Answers already played for the recorded bytes count for a request that differs in white space only."""
    sink = Memory()
    tape = Tape(sink=sink)
    for index in range(3):
        tape.record(tape.issue(HTTPRequest(url=URL, body=SPELLINGS[0], headers={})), answer(f"answer {index}"))
    replay = again(sink)
    asked = [HTTPRequest(url=URL, body=SPELLINGS[index], headers={}) for index in (0, 2, 0)]
    assert [played(replay, request) for request in asked] == ["answer 0", "answer 1", "answer 2"]
    replay.close()


def test_lines_are_decoded_exactly() -> None:
    """A line decodes to the exchange that was encoded, for any bytes in the bodies."""
    for body in (b"", b"\xff\x00", "é\x7f\x85\u2028\ufeff \U0001f600".encode(), b'"!!binary "'):
        sink = Memory()
        tape = Tape(sink=sink)
        tape.record(
            tape.issue(HTTPRequest(url=URL, body=body, headers={})), HTTPReply(status=200, body=body, headers={})
        )
        (row,) = index_lines(sink.lines)
        exchange = row.exchange()
        assert (exchange.request.body, exchange.reply.body) == (body, body)
        assert encode_line(exchange) == row.line


def test_a_miss_is_vcrpys_exception_too() -> None:
    """If vcrpy is imported, code that catches its exception continues; it is our miss all the same."""
    errors = pytest.importorskip("vcr.errors")
    tape = Tape()
    with pytest.raises(errors.CannotOverwriteExistingCassetteException) as caught:
        tape.play(tape.issue(ask()))
    assert isinstance(caught.value, CassetteMissError)
    assert getattr(caught.value, "failed_request", "") is None
    with pytest.raises(errors.CannotOverwriteExistingCassetteException) as again:
        tape.close()
    assert f"{again.value}" == f"{caught.value}"


def test_misses_are_reported_if_they_are_not_raised_again() -> None:
    """As under vcrpy, a test that caught a miss continues."""
    tape = Tape(name="demo", rules=TapeRules(raises_again=False))
    with pytest.raises(CassetteMissError):
        tape.play(tape.issue(ask()))
    tape.close()
    assert len(tape.report) == 1
    assert tape.report[0].startswith("demo: 1 requests had no recorded answer: ")
