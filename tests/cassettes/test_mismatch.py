"""A miss names the nearest recorded request and shows the difference."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from aggregator import LLM, cassette
from aggregator.cassettes.exchanges import Exchange, Facts, Row, encode_line, index_lines
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.mismatch import MAX_LINES, Asked, explain_miss, nearest
from aggregator.cassettes.storage import save
from aggregator.cassettes.tape import Tape
from aggregator.cli.main import main
from aggregator.errors import CassetteMissError
from aggregator.records import HTTPReply, HTTPRequest
from aggregator.testing import FakeTransport

URL = "https://api.example.com/v1/chat/completions"
WORDS = ["agent", "prompt", "score", "feedback", "update", "value", "batch", "epoch", "sample", "reward", "policy"]


def request(body: object, url: str = URL) -> HTTPRequest:
    return HTTPRequest(url=url, body=json.dumps(body).encode(), headers={})


def rows_of(*requests: HTTPRequest) -> tuple[Row, ...]:
    reply = HTTPReply(status=200, body=b"{}", headers={})
    exchanges = (
        Exchange(request=one, reply=reply, facts=Facts(lineage=f"sample={index}")) for index, one in enumerate(requests)
    )
    return tuple(index_lines(encode_line(one) for one in exchanges))


def chat(text: str, **more: object) -> HTTPRequest:
    return request(
        {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
            **more,
        }
    )


def test_the_nearest_had_another_number_than_in_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`aggregator cassette show FILE NUMBER` shows the exchange that a miss names."""
    path = tmp_path / "two.yaml"
    save(path, rows_of(chat("Who?"), chat("How old is the sun?")))
    with pytest.raises(CassetteMissError) as caught, cassette(path, "none", warn=False) as tape:
        tape.play(tape.issue(chat("How old is the moon?")))
    number = re.search(r"nearest: exchange (\d+)", str(caught.value))
    assert number is not None
    main(["cassette", "show", str(path), number[1]])
    assert "How old is the sun?" in capsys.readouterr().out


def message(asked: HTTPRequest, *recorded: HTTPRequest) -> str:
    tape = Tape(rows_of(*recorded), name="demo.yaml")
    with pytest.raises(CassetteMissError) as caught, lineage("test"):
        tape.play(tape.issue(asked))
    return str(caught.value)


def test_the_difference_has_a_json_path() -> None:
    """The message has the request, its lineage, the nearest one, the path that differs and how to record."""
    assert message(chat("How old is the moon?", seed=1), chat("Who?"), chat("How old is the sun?", seed=2)) == (
        f"Expected a recorded answer to POST {URL} in demo.yaml, got none\n"
        "  lineage 'test', ticket 0; 2 of 2 not played\n"
        "  nearest: exchange 1, lineage 'sample=1', ticket 0, not played yet, 94% alike\n"
        "  messages[1].content, from character 15:\n"
        "    recorded  'How old is the sun?'\n"
        "    asked     'How old is the moon?'\n"
        "  seed: recorded 2, asked 1\n"
        'To record it, run again with mode="new_episodes" (adds) or "all" (re-records), '
        "in pytest --cassette-mode=new_episodes."
    )


def test_bodies_without_white_space_were_all_equally_similar() -> None:
    """Our client's JSON has no blanks, so one changed word changed the only word of the body: 0% alike."""
    bodies = (
        b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % word for word in (b"ship", b"route", b"routed")
    )
    other, recorded, asked = (HTTPRequest(url=URL, body=body, headers={}) for body in bodies)
    assert "nearest: exchange 0, lineage 'sample=0', ticket 0, not played yet, 9" in message(asked, recorded, other)


def test_added_and_missing_fields_are_shown() -> None:
    """A field of one side has "nothing" on the other; another method or URL is shown too."""
    text = message(request({"b": [1, 2]}, URL + "/x"), request({"a": {"c": None}, "b": [1]}))
    assert "  url, from character 43:" in text
    assert '  a: recorded {"c":null}, asked nothing' in text
    assert "  b[1]: recorded nothing, asked 2" in text


def test_the_same_request_in_another_lineage() -> None:
    """For a request recorded in other lineages the message lists them."""
    text = message(chat("hi"), chat("hi"), chat("hi"), chat("ho"))
    assert 'in another lineage; lineage="prefer" would take it from there' in text
    assert "exchange 0, lineage 'sample=0', ticket 0, not played yet" in text
    assert "exchange 2" not in text


def test_one_call_more_than_recorded() -> None:
    """For the second of two identical calls, of which one was recorded, the message says so."""
    tape = Tape(rows_of(chat("hi")))
    with lineage("sample=0"):
        assert tape.play(tape.issue(chat("hi"))) is not None
        with pytest.raises(CassetteMissError, match="recorded 1 time in this lineage, and is requested again"):
            tape.play(tape.issue(chat("hi")))


def test_a_missing_ticket_is_not_reported_as_one_call_too_many() -> None:
    """If the first of two identical calls is gone, as after `prune`, the second one is reported as unplayed."""
    (row,) = rows_of(chat("hi"))
    line = encode_line(replace(row.exchange(), facts=Facts(lineage="sample=0", ticket=1)))
    tape = Tape(tuple(index_lines([line])))
    with lineage("sample=0"), pytest.raises(CassetteMissError) as caught:
        tape.play(tape.issue(chat("hi")))
    assert "recorded in this lineage, but not with ticket 0:\n    exchange 0" in str(caught.value)


def test_an_empty_cassette() -> None:
    """The message says that there are no exchanges."""
    assert "the cassette does not exist or is empty" in message(chat("hi"))


@pytest.mark.parametrize("body", [b"no JSON", b"\xff\xfe", b""])
def test_bodies_that_are_not_json(body: bytes) -> None:
    """Other bodies are compared as text."""
    text = message(HTTPRequest(url=URL, body=body, headers={}), HTTPRequest(url=URL, body=b"other", headers={}))
    assert "  body, from character 0:" in text


def test_the_report_is_short() -> None:
    """The report has at most 40 lines for any difference."""
    text = message(request({f"a{i}": "x" * 500 for i in range(100)}), request({f"a{i}": "y" * 500 for i in range(100)}))
    assert len(text.splitlines()) == MAX_LINES
    assert "more lines of differences" in text


def test_secrets_are_not_shown() -> None:
    """The message shows the request without its secrets."""
    asked = HTTPRequest(
        url=URL + "?key=abcdefghij1234567",
        body=b'{"q": "my abcdefghij1234567", "api_key": "zyx"}',
        headers={},
        secrets=("abcdefghij1234567",),
    )
    text = message(asked, chat("hi"))
    assert "abcdefghij1234567" not in text
    assert "zyx" not in text


def test_many_misses_stay_cheap() -> None:
    """After the first few misses the nearest request is no longer searched for."""
    tape = Tape(rows_of(chat("hi")))
    for index in range(8):
        with pytest.raises(CassetteMissError):
            tape.play(tape.issue(chat(f"miss {index}")))
    assert ["nearest: exchange" in str(miss) for miss in tape.misses] == [True] * 5 + [False] * 3


def prose(draw: random.Random, length: int) -> str:
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(300)}" for _ in range(length))


def found(count: int, tries: int, length: int) -> int:
    """Return how often the true origin of a changed request is named first."""
    draw = random.Random(count)
    requests = [chat(prose(draw, length)) for _ in range(count)]
    rows = rows_of(*requests)
    right = 0
    for _ in range(tries):
        index = draw.randrange(count)
        words = requests[index].body.decode().split(" ")
        for _ in range(draw.choice([1, 3, length // 5])):
            place = draw.randrange(15, len(words) - 2)
            words[place : place + draw.choice([0, 1])] = draw.choice([[], ["changed"], ["quite", "new"]])
        asked = HTTPRequest(url=URL, body=" ".join(words).encode(), headers={})
        right += nearest(Asked(request=asked, key=b"", lineage="", ticket=0), rows)[0] == index
    return right


def test_the_true_origin_is_first() -> None:
    """The origin of a request with some words changed, added or removed is found."""
    assert found(count=800, tries=20, length=60) >= 19


@pytest.mark.long
def test_the_true_origin_is_first_among_ten_thousand() -> None:
    """With 10,000 candidates at least 95 of 100 are right."""
    assert found(count=10_000, tries=100, length=300) >= 95


def test_a_small_difference_in_a_common_text() -> None:
    """Requests that differ in one number are distinguished by it."""
    requests = [chat(f"Question {index} of the exam: what is it?") for index in range(600)]
    asked = chat("Question 437 of the exam: what was it?")
    assert "exchange 437," in explain_miss(
        Asked(request=asked, key=b"", lineage="", ticket=0), rows_of(*requests), bytearray(600), "a.yaml"
    )


def test_the_nearest_of_texts_without_blanks() -> None:
    """Chinese has no blanks between words, so characters are compared."""
    asked, *recorded = (
        chat(text)
        for text in (
            "\u6211\u7684\u5305\u88f9\u5728\u54ea\u91cc",
            "\u53d1\u7968\u9519\u4e86",
            "\u4f60\u7684\u5305\u88f9\u5728\u54ea\u91cc",
        )
    )
    requests = [
        HTTPRequest(url=URL, body=json.dumps(json.loads(one.body), ensure_ascii=False).encode(), headers={})
        for one in recorded
    ]
    asked = HTTPRequest(url=URL, body=json.dumps(json.loads(asked.body), ensure_ascii=False).encode(), headers={})
    assert nearest(Asked(request=asked, key=b"", lineage="", ticket=0), rows_of(*requests))[0] == 1


def test_a_miss_of_our_client_counted_the_forms_that_it_tried(tmp_path: Path) -> None:
    """The first request of a lineage was reported with ticket 4: each correction of it had taken one."""
    llm = LLM("openai/gpt-4o-mini", api_key="none", transport=FakeTransport("hello"))
    with cassette(tmp_path / "a.yaml", "all"):
        llm("How old is the sun?")
    missed = pytest.raises(CassetteMissError, match="lineage '', ticket 0; 1 of 1 not played")
    with missed, cassette(tmp_path / "a.yaml", "none"):
        llm("How old is the moon?")
