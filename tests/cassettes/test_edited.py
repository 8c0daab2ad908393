"""Cassettes that were edited by hand: refused as they are, accepted by `accept`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from aggregator.cassettes.exchanges import Exchange, encode_line
from aggregator.cassettes.journal import Layout
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.storage import read, read_edited
from aggregator.cli._exchanges import secrets_in
from aggregator.cli.main import main
from aggregator.errors import CassetteDamagedError
from aggregator.records import HTTPReply, HTTPRequest

URL = "https://api.example.com/v1"
LAYOUTS: list[Layout] = ["journal", "readable"]


def ask(text: str) -> HTTPRequest:
    return HTTPRequest(url=URL, body=json.dumps({"q": text}).encode(), headers={"content-type": "application/json"})


def record(path: Path, *asked: str, layout: Layout = "readable", chunks: tuple[tuple[int, float], ...] = ()) -> Path:
    tape = open_tape(path, "all", layout=layout)
    with lineage("run"):
        for text in asked:
            reply = HTTPReply(status=200, body=b'{"a": "%b"}' % text.encode(), headers={}, chunks=chunks)
            tape.record(tape.issue(ask(text)), reply)
    tape.close()
    return path


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def answers(path: Path, *asked: str) -> list[str]:
    tape = open_tape(path, "none", warn=False)
    with lineage("run"):
        replies = [tape.play(tape.issue(ask(text))) for text in asked]
    tape.close(warn=False)
    return [reply.body.decode() for reply in replies if reply is not None]


def exchanges(path: Path) -> list[Exchange]:
    recording = read(path)
    assert recording is not None
    return [row.exchange() for row in recording.rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edited_answer_is_accepted(tmp_path: Path, layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    """Its hash is computed again; the other exchanges and the layout are unchanged."""
    path = record(tmp_path / "a.yaml", "one", "two", layout=layout)
    before = exchanges(path)
    quote = '\\"' if layout == "journal" else '"'
    edit(path, (f"{{{quote}a{quote}: {quote}one", f"{{{quote}a{quote}: {quote}ONE"))
    with pytest.raises(CassetteDamagedError, match="aggregator cassette accept"):
        read(path)
    assert main(["cassette", "accept", "--dry-run", str(path)]) == 0
    with pytest.raises(CassetteDamagedError):
        read(path)
    assert main(["cassette", "accept", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 exchanges, 1 changed, 0 added, 0 removed\n" * 2
    assert answers(path, "two", "one") == ['{"a": "two"}', '{"a": "ONE"}']
    after = exchanges(path)
    assert (after[1], after[0].facts) == (before[1], before[0].facts)
    assert b"layout=%b state=closed" % layout.encode() in path.read_bytes()
    assert main(["cassette", "accept", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 exchanges, as recorded\n"


EDITS: list[Callable[[str], str]] = [
    lambda text: text + "\n",
    lambda text: text.rstrip("\n"),
    lambda text: "# a note\n" + text,
    lambda text: "\ufeff" + text,
    lambda text: text.replace("interactions:\n", "# a note\ninteractions:\n", 1),
    lambda text: text.replace("interactions:\n", "interactions:\n# a note\n\n", 1),
    lambda text: json.dumps(yaml.safe_load(text)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", EDITS)
def test_a_file_with_an_edit_between_its_exchanges_was_unreadable(
    tmp_path: Path, layout: Layout, change: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Notes, blank lines and another YAML form change no exchange, but break the file's hash."""
    path = record(tmp_path / "a.yaml", "one", "two", layout=layout)
    before = path.read_bytes()
    path.write_text(change(path.read_text()))
    assert main(["cassette", "accept", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 exchanges, as recorded, in a file that was edited\n"
    recording = read(path)
    assert recording is not None
    assert (recording.state, recording.findings) == ("closed", ())
    if "- request" in before.decode():
        assert path.read_bytes() == before
    assert main(["cassette", "check", str(path)]) == 0


def drop_an_exchange(path: Path) -> None:
    head, _, second = path.read_text().split("- request:")
    path.write_text(f"{head}- request:{second}")


def add_an_exchange(path: Path) -> None:
    item = {
        "request": {"method": "POST", "uri": URL, "body": '{"q": "one"}', "headers": {}},
        "response": {"status": {"code": 200, "message": ""}, "headers": {}, "body": {"string": '{"a": "new"}'}},
    }
    path.write_text(path.read_text() + yaml.safe_dump([item]))


def drop_the_comment(path: Path) -> None:
    path.write_text(path.read_text().partition("\n")[2])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop_an_exchange, "1 exchange, 0 changed, 0 added, 1 removed"),
        (add_an_exchange, "3 exchanges, 0 changed, 1 added, 0 removed"),
        (drop_the_comment, "2 exchanges, as recorded, in a file that was edited"),
    ],
)
def test_exchanges_can_be_added_and_removed(
    tmp_path: Path, change: Callable[[Path], None], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An added exchange without our facts has no lineage."""
    path = record(tmp_path / "a.yaml", "one", "two")
    change(path)
    assert main(["cassette", "accept", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: {told}\n"
    assert len(exchanges(path)) == int(told[0])


def test_an_edited_request_gets_a_new_ticket(tmp_path: Path) -> None:
    """Of two equal requests one is changed: each is then the first of its kind."""
    path = record(tmp_path / "a.yaml", "same", "same", "same")
    head, first, second, third = path.read_text().split("- request:")
    path.write_text("- request:".join((head, first.replace('"q": "same"', '"q": "other"'), second, third)))
    assert main(["cassette", "accept", str(path)]) == 0
    assert sorted((json.loads(one.request.body)["q"], one.facts.ticket) for one in exchanges(path)) == [
        ("other", 0),
        ("same", 0),
        ("same", 1),
    ]
    assert len(answers(path, "other", "same", "same")) == 3


def test_an_edited_stream_has_one_chunk(tmp_path: Path) -> None:
    """The recorded chunk boundaries belong to the previous body."""
    path = record(tmp_path / "a.yaml", "one", chunks=((4, 1.0), (8, 9.0)))
    edit(path, ('"a": "one"', '"a": "one and more"'))
    (row,) = read_edited(path).rows
    assert row.facts.chunks == ((21, 9.0),)
    assert row.reply().chunks == ((21, 9.0),)


def test_a_secret_that_was_edited_in_is_redacted(tmp_path: Path) -> None:
    """`accept` applies the same redaction as a recording."""
    path = record(tmp_path / "a.yaml", "one")
    edit(path, ('"a": "one"', '"api_key": "x9Kp21-7fQz"'))
    assert main(["cassette", "accept", str(path)]) == 0
    assert [secrets_in(one) for one in exchanges(path)] == [[]]
    assert "Kp21" not in path.read_text()


def test_shards_are_accepted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cassette of several files is rewritten as a whole."""
    monkeypatch.setattr("aggregator.cassettes.storage.SHARD_BYTES", 700)
    path = record(tmp_path / "a.yaml", *"abcdef")
    shards = sorted(tmp_path.iterdir())
    assert len(shards) > 2
    edit(shards[1] if shards[0] == path else shards[0], ('{"a": "', '{"a": "edited '))
    assert main(["cassette", "accept", str(path)]) == 0
    assert sum("edited" in answer for answer in answers(path, *"abcdef")) >= 1
    assert len(exchanges(path)) == 6


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("version: 1\ninteractions: []\n", "Expected a cassette of ours that was edited, got another tool's"),
        ("oops", "Expected a cassette"),
        ('version: 1\ninteractions:\n- {"request":{}}\n', "Expected an exchange in one line of JSON"),
    ],
)
def test_a_file_that_cannot_be_accepted_is_an_error(
    tmp_path: Path, text: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another tool's file is converted; an undecodable exchange is named with its line, and the file is not changed."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert main(["cassette", "accept", str(path)]) == 1
    assert problem in capsys.readouterr().err
    assert path.read_text() == text


def test_an_open_recording_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It must be finished first."""
    tape = open_tape(tmp_path / "a.yaml", "all")
    tape.record(tape.issue(ask("one")), HTTPReply(status=200, body=b"", headers={}))
    assert main(["cassette", "accept", str(tmp_path / "a.yaml")]) == 1
    assert "held by process" in capsys.readouterr().err
    tape.close()


def test_edited_facts_are_accepted(tmp_path: Path) -> None:
    """A lineage may be renamed, in every exchange or in one."""
    path = record(tmp_path / "a.yaml", "one")
    edit(path, ('"lineage":"run"', '"lineage":"other"'))
    assert main(["cassette", "accept", str(path)]) == 0
    (one,) = exchanges(path)
    assert one.facts.lineage == "other"
    assert encode_line(one) == encode_line(replace(one, facts=replace(one.facts, key=b"x")))
