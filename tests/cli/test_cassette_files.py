"""`aggregator cassette` on files that are damaged, in use, foreign, or hostile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator.cassettes.exchanges import Exchange, Facts, encode_line, exchange_id, index_lines
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.storage import read, save
from aggregator.cassettes.tape import Tape
from aggregator.cli.main import main
from aggregator.records import HTTPReply, HTTPRequest

REPLY = HTTPReply(status=200, reason="OK", body=b'{"text": "hi"}', headers={})


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Return the exit code and the text on both streams."""
    try:
        code = main(["cassette", *map(str, words)])
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def add(tape: Tape, *names: str) -> None:
    for name in names:
        tape.record(tape.issue(HTTPRequest(url=f"http://x.example/{name}", body=b"{}", headers={})), REPLY)


def recorded(path: Path, *names: str) -> Path:
    """Record an exchange for each name and finish the file."""
    tape = open_tape(path, "all")
    add(tape, *names)
    tape.close()
    return path


def killed(path: Path, *names: str) -> bytes:
    """Leave the journal of a killed recording, and return its bytes."""
    tape = open_tape(path, "all")
    add(tape, *names)
    data = path.read_bytes()
    tape.close()
    path.write_bytes(data)
    return data


def held(path: Path) -> int:
    recording = read(path)
    assert recording is not None
    return len(recording.rows)


COMMANDS = [("prune", "--lineage", "*"), ("convert",)]


@pytest.mark.parametrize("words", COMMANDS, ids=["prune", "convert"])
def test_a_running_recording_lost_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """A file that is being recorded is not rewritten; the error names the recording process."""
    path = tmp_path / "a.yaml"
    tape = open_tape(path, "once")
    add(tape, "a", "b", "c")
    code, _, err = run(capsys, words[0], path, *words[1:])
    assert (code, f"a lock held by process {os.getpid()}" in err) == (1, True)
    add(tape, "d", "e", "f")
    tape.close()
    assert held(path) == 6


@pytest.mark.parametrize("words", COMMANDS, ids=["prune", "convert"])
def test_a_killed_recording_was_marked_as_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """It is refused, so that the next run continues it; converting it to another file leaves it unchanged."""
    path = tmp_path / "a.yaml"
    before = killed(path, "a", "b")
    code, _, err = run(capsys, words[0], path, *words[1:])
    assert (code, 'run it again with mode="once"; or convert it to another file' in err) == (1, True)
    assert run(capsys, "convert", path, tmp_path / "b.yaml")[0] == 0
    assert (path.read_bytes(), held(tmp_path / "b.yaml")) == (before, 2)
    assert run(capsys, "convert", tmp_path / "b.yaml", path)[0] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.yaml", "b.yaml"]


def test_the_rest_of_a_folder_is_still_shown_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged file is reported, with exit code 1, and the others are processed."""
    (tmp_path / "a.yaml").write_text("interactions: [")
    killed(tmp_path / "b.yaml", "x")
    path = recorded(tmp_path / "c.yaml", "x", "y")
    for words in (("ls",), ("stats",), ("stats", "--each")):
        code, out, err = run(capsys, words[0], tmp_path, *words[1:])
        assert (code, err.count("\n"), "a.yaml" in err) == (1, 1, True)
        assert ("all" if words == ("stats",) else "c.yaml") in out
    code, out, err = run(capsys, "prune", tmp_path, "--lineage", "*")
    assert (code, held(path), out) == (1, 0, f"{path}: 2 exchanges dropped, 0 kept\n")
    assert ("a.yaml" in err, "b.yaml" in err) == (True, True)


@pytest.mark.parametrize("layout", ["journal", "readable"])
def test_pruning_everything_left_an_unreadable_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Any
) -> None:
    """An empty cassette is valid."""
    path = recorded(tmp_path / "a.yaml", "x")
    recording = read(path)
    assert recording is not None
    save(path, recording.rows, layout)
    assert run(capsys, "prune", path, "--lineage", "*")[0] == 0
    assert run(capsys, "check", path) == (0, "1 cassette, 0 exchanges: good\n", "")
    assert run(capsys, "convert", path, tmp_path / "b.yaml", "--layout", "journal")[0] == 0
    assert run(capsys, "check", tmp_path / "b.yaml")[0] == 0


def test_foreign_data_was_reported_as_damaged_cassettes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`aggregator cassette check tests` skips it, unless the file itself is given."""
    recorded(tmp_path / "cassettes" / "a.yaml", "x")
    (tmp_path / "tickets.json").write_text('[{"text": "late"}]')
    (tmp_path / "template.yaml").write_text("{% if %}: [")
    assert run(capsys, "check", tmp_path) == (0, "1 cassette, 1 exchange: good\n", "")
    assert run(capsys, "prune", tmp_path, "--older-than", 9)[0] == 0
    assert run(capsys, "check", tmp_path / "tickets.json")[0] == 1


def account(folder: Path, tests: Any) -> Path:
    """Write the account that a pytest run leaves in its cache, and return the cache."""
    file = folder / "v" / "aggregator" / "cassettes"
    file.parent.mkdir(parents=True)
    file.write_text(tests if isinstance(tests, str) else json.dumps(tests))
    return folder


def test_a_failing_run_let_prune_drop_needed_exchanges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cassette with a test that did not pass or run is skipped, with a message."""
    paths = [recorded(tmp_path / name, "x") for name in ("whole.yaml", "part.yaml")]
    recording = read(paths[0])
    assert recording is not None
    left = [exchange_id(row) for row in recording.rows]
    tests = {
        "test_a": {"path": str(paths[0]), "unplayed": left, "report": True},
        "test_b": {"path": str(paths[1]), "unplayed": left, "complete": False},
        "test_c": {"path": str(paths[1]), "unplayed": left, "complete": True},
    }
    cache = account(tmp_path / "cache", tests)
    told = f"{paths[1]}: passed over: a test that plays it did not pass or did not run in whole; run its tests again\n"
    code, out, _ = run(capsys, "check", *paths, "--orphans", "--pytest-cache", cache)
    assert (code, told in out, out.endswith("2 cassettes, 2 exchanges: 1 problem\n")) == (1, True, True)
    code, out, _ = run(capsys, "prune", *paths, "--unplayed", "--pytest-cache", cache)
    assert (code, told in out) == (0, True)
    assert [held(path) for path in paths] == [0, 1]


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"t": 5}', '{"t": {"path": "a"}}', '{"t": {"path": 1, "unplayed": []}}']
)
def test_a_malformed_account_raised_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """The error names the file."""
    path, cache = recorded(tmp_path / "a.yaml", "x"), account(tmp_path / "cache", text)
    for words in (("check", "--orphans"), ("prune", "--unplayed")):
        code, _, err = run(capsys, words[0], path, *words[1:], "--pytest-cache", cache)
        assert (code, "Expected the account of a pytest run in" in err) == (1, True)


@pytest.mark.parametrize("days", ["nan", "inf", "1e9", "-1", "soon"])
def test_invalid_days_raised_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str], days: str) -> None:
    """They are a usage error."""
    path = recorded(tmp_path / "a.yaml", "x")
    for words in (("check", f"--max-age={days}"), ("prune", f"--older-than={days}")):
        code, _, err = run(capsys, words[0], path, words[1])
        assert (code, f"Expected a number of days from 0 to 1,000,000, got '{days}'" in err) == (2, True)


def test_a_sharded_cassette_behind_a_link_could_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its other shards are next to the file, not next to the link. Without its first shard it is damaged."""
    lines = [
        encode_line(
            Exchange(
                request=HTTPRequest(url=f"http://x.example/{name}", body=b"{}", headers={}),
                reply=HTTPReply(status=200, body=name.encode() * 6_000_000, headers={}),
                facts=Facts(lineage=name),
            )
        )
        for name in "ab"
    ]
    path, link = tmp_path / "real" / "a.yaml", tmp_path / "link" / "b.yaml"
    save(path, list(index_lines(lines)), "journal")
    link.parent.mkdir()
    link.symlink_to(path)
    assert run(capsys, "check", link) == (0, "1 cassette, 2 exchanges: good\n", "")
    path.unlink()
    code, out, _ = run(capsys, "check", path.parent)
    assert (code, "Expected the first shard of a cassette" in out) == (1, True)


def test_vcrpys_json_became_yaml_under_the_same_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock vcrpy would read it as JSON, so another name is required."""
    path = tmp_path / "v.json"
    request: dict[str, Any] = {"method": "GET", "uri": "http://x.example/", "body": None, "headers": {}}
    response = {"status": {"code": 200, "message": "OK"}, "headers": {}, "body": {"string": "hi"}}
    path.write_text(json.dumps({"version": 1, "interactions": [{"request": request, "response": response}]}))
    for words in (("convert", path), ("prune", path, "--lineage", "*")):
        code, _, err = run(capsys, *words)
        assert (code, f"aggregator cassette convert {path} {tmp_path / 'v.yaml'}" in err) == (1, True)
    assert run(capsys, "convert", path, tmp_path / "v.yaml")[0] == 0
    assert yaml.safe_load((tmp_path / "v.yaml").read_text())["version"] == 1


def test_a_folder_is_not_an_output_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error advised the user to free some space."""
    path = recorded(tmp_path / "a.yaml", "x")
    code, _, err = run(capsys, "convert", path, tmp_path)
    assert (code, "Expected a file to write, got the folder" in err, "space" in err) == (1, True, False)


def test_a_recorded_answer_controlled_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its control characters are printed as escapes."""
    path = tmp_path / "a.yaml"
    exchange = Exchange(
        request=HTTPRequest(url="http://x.example/", body=b'{"model": "m\\u001b[31m"}', headers={}),
        reply=HTTPReply(status=200, body=b"\x1b]0;pwned\x07\x1b[2Jhello", headers={}),
        facts=Facts(lineage="a\rb"),
    )
    save(path, list(index_lines([encode_line(exchange)])))
    empty = recorded(tmp_path / "b.yaml", "x")
    for words in (("ls", path), ("show", path), ("show", path, 0), ("stats", path), ("diff", path, empty)):
        _, out, err = run(capsys, *words)
        assert not {"\x1b", "\x07", "\r"} & set(out + err)
    assert r"\x1b]0;pwned\x07\x1b[2Jhello" in run(capsys, "show", path, 0)[1]


def test_the_module_did_nothing() -> None:
    """`python -m aggregator.cli.main` runs the command too."""
    out = subprocess.run(
        [sys.executable, "-m", "aggregator.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("aggregator ")
