"""Lines with a valid hash that no recorder wrote: reported as damage, wherever they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from aggregator.cassettes.exchanges import Exchange, Facts, encode_line, index_lines
from aggregator.cassettes.journal import PREAMBLE, Comment, content_hash
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.storage import read
from aggregator.cli._exchanges import check
from aggregator.errors import CassetteDamagedError
from aggregator.records import HTTPReply, HTTPRequest

REQUEST = HTTPRequest(url="https://api.example.com/v1", body=b'{"q":1}', headers={"accept": "no"})
REPLY = HTTPReply(status=200, reason="OK", body=b'{"a":2}', headers={"content-type": "application/json"})
LINE = encode_line(Exchange(request=REQUEST, reply=REPLY, facts=Facts(lineage="")))
DEEP = b"[" * 100_000 + b"]" * 100_000


def forged(path: Path, line: bytes) -> Path:
    """Write one line as a closed journal with a valid hash."""
    content = PREAMBLE + b"- %b\n" % line
    path.write_bytes(Comment(layout="journal", exchanges=1, sha256=content_hash(content)).render() + content)
    return path


def play(path: Path) -> object:
    tape = open_tape(path, "none", warn=False)
    return tape.play(tape.issue(REQUEST))


def inspect(path: Path) -> object:
    recording = read(path)
    assert recording is not None
    return check(recording, needles=(), now=datetime.now(UTC), max_age=None)


@pytest.mark.parametrize("use", [play, inspect])
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b'"code":200', b'"code":"x"'),
        (b'["application/json"]', b'["a",5]'),
        (b'["application/json"]', b"[]"),
        (b'{"string":"{\\"a\\":2}"}', b'{"string":5}'),
        (b'{"string":"{\\"a\\":2}"}', b'{"string":!!binary "A"}'),
        (b'{"string":"{\\"a\\":2}"}', b'{"string":{"text":"A"}}'),
        (rb"{\"lineage\":\"\"", rb"{\"lineage\":\"\",\"usage\":" + DEEP),
    ],
    ids=["status", "a number among values", "no value", "number", "base64", "mapping", "nesting"],
)
def test_a_forged_line_raised_its_decoders_exception(
    tmp_path: Path, use: Callable[[Path], object], good: bytes, bad: bytes
) -> None:
    """Reading a cassette raises CassetteError only; the error has the remedy."""
    line = LINE.replace(good, bad)
    assert line != LINE
    with pytest.raises(CassetteDamagedError, match="Expected an exchange, got .*restore it from version control"):
        use(forged(tmp_path / "forged.yaml", line))


def test_a_request_body_that_is_a_number_is_damage() -> None:
    """It is decoded only if a request with other bytes is looked up."""
    (row,) = index_lines([LINE.replace(b'"body":"{\\"q\\":1}"', b'"body":5')])
    with pytest.raises(CassetteDamagedError, match="request.body"):
        assert row.key


def rehashed(line: bytes) -> bytes:
    """Give an edited line its hash."""
    body = line[: line.rindex(rb",\"sha256\"")]
    return body + json.dumps(f',"sha256":"{sha256(body).hexdigest()}"}}')[1:].encode() + b"}"


@pytest.mark.parametrize(
    "edited", [LINE.replace(b'\\"q\\":1', b'\\"q\\":2'), rehashed(LINE.replace(b'\\"q\\":1', b'\\"q\\":2'))]
)
def test_check_finds_a_wrong_key(tmp_path: Path, edited: bytes) -> None:
    """A replay trusts the stored key, so an edit that keeps it would answer another question."""
    assert edited != LINE
    problems: Any = inspect(forged(tmp_path / "edited.yaml", edited))
    assert [problem.partition(": ")[2] for problem in problems] == [
        "its key or its hash is not its own; it was edited: record again"
    ]
    assert inspect(forged(tmp_path / "whole.yaml", rehashed(LINE))) == []
