"""Other tools' cassettes: converted exchange by exchange, or refused with the tool's name."""

from __future__ import annotations

import base64
import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aggregator.cassettes.exchanges import Exchange
from aggregator.cassettes.matching import canonical_url
from aggregator.cassettes.recorder import Mode, open_tape
from aggregator.cassettes.storage import read
from aggregator.cli._exchanges import find_cassettes
from aggregator.errors import CassetteDamagedError, CassetteRefusedError, ConfigError
from aggregator.records import HTTPReply, HTTPRequest

URL = "https://api.example.com/v1/chat?x=1"
ASKED = '{"model": "m"}'
ANSWER = '{"id": "1"}'
HAR = {
    "log": {
        "version": "1.2",
        "creator": {"name": "Polly.JS"},
        "entries": [
            {
                "request": {
                    "method": "POST",
                    "url": URL,
                    "headers": [{"name": "Content-Type", "value": "application/json"}, {"name": ":path", "value": "/"}],
                    "postData": {"mimeType": "application/json", "text": ASKED},
                },
                "response": {
                    "status": 201,
                    "statusText": "Created",
                    "headers": [
                        {"name": "Content-Type", "value": "application/json"},
                        {"name": "Content-Encoding", "value": "gzip"},
                    ],
                    "content": {"text": base64.b64encode(ANSWER.encode()).decode(), "encoding": "base64"},
                },
            },
            {"request": {"method": "GET", "url": URL}, "response": {"status": 0}},
        ],
    }
}
GO = {
    "version": 2,
    "interactions": [
        {
            "id": 0,
            "request": {"url": URL, "method": "POST", "body": ASKED, "headers": {"Content-Type": ["application/json"]}},
            "response": {
                "body": ANSWER,
                "headers": {"Content-Type": ["application/json"], "Content-Encoding": ["gzip"]},
                "status": "201 Created",
                "code": 201,
                "uncompressed": True,
                "duration": "12ms",
            },
        }
    ],
}
NOCK = [
    {
        "scope": "https://api.example.com:443",
        "method": "POST",
        "path": "/v1/chat?x=1",
        "body": {"model": "m"},
        "status": 201,
        "response": {"id": "1"},
        "rawHeaders": ["Content-Type", "application/json"],
    }
]
R = {
    "http_interactions": [
        {
            "request": {"method": "post", "uri": URL, "body": {"encoding": "", "string": ASKED}, "headers": {}},
            "response": {
                "status": {"status_code": "201", "message": "Created"},
                "headers": {"content-type": "application/json"},
                "body": {"encoding": "UTF-8", "string": ANSWER},
            },
        }
    ]
}
PHP = [
    {
        "request": {"method": "POST", "url": URL, "headers": {"Host": "api.example.com"}, "body": ASKED},
        "response": {
            "status": {"http_version": "1.1", "code": "201", "message": "Created"},
            "headers": {"Content-Type": "application/json"},
            "body": ANSWER,
        },
    }
]
AZURE = {
    "Entries": [
        {
            "RequestUri": URL,
            "RequestMethod": "POST",
            "RequestHeaders": {"Content-Type": "application/json"},
            "RequestBody": {"model": "m"},
            "StatusCode": 201,
            "ResponseHeaders": {"Content-Type": "application/json"},
            "ResponseBody": {"id": "1"},
        }
    ]
}
TOOLS: dict[str, tuple[Any, str]] = {
    "HAR": (HAR, "a.har"),
    "go-vcr 1": ({**GO, "version": 1}, "a.yaml"),
    "go-vcr 2": (GO, "a.yaml"),
    "go-vcr 3": ({**GO, "version": 3}, "a.yaml"),
    "nock": (NOCK, "a.json"),
    "R": (R, "a.yml"),
    "PHP": (PHP, "a.yml"),
    "Azure": (AZURE, "a.json"),
}


def write(path: Path, document: Any) -> Path:
    text = json.dumps(document) if path.suffix in (".json", ".har") else yaml.safe_dump(document)
    path.write_text(text)
    return path


def exchanges(path: Path) -> list[Exchange]:
    recording = read(path)
    assert recording is not None
    return [row.exchange() for row in recording.rows]


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_cassettes_are_converted(tmp_path: Path, tool: str) -> None:
    """Request, status, headers and body are those that were recorded, and they play."""
    document, name = TOOLS[tool]
    path = write(tmp_path / name, document)
    (exchange,) = exchanges(path)
    request, reply = exchange.request, exchange.reply
    assert (request.method, json.loads(request.body)) == ("POST", {"model": "m"})
    assert request.url in (URL, URL.replace(".com/", ".com:443/"))
    assert (reply.status, json.loads(reply.body)) == (201, {"id": "1"})
    assert reply.headers["content-type"] == "application/json"
    assert "content-encoding" not in reply.headers
    tape = open_tape(path, "none")
    asked = HTTPRequest(url=URL, body=b'{"model":"m"}', headers={"content-type": "application/json"})
    assert tape.play(tape.issue(asked)) is not None
    tape.close()
    assert find_cassettes([tmp_path]) == [path]


def test_variants_of_other_tools(tmp_path: Path) -> None:
    """Forms of a HAR, nock's bodies as hexadecimal chunks or text, and files without an exchange."""
    har = json.loads(json.dumps(HAR))
    entry = har["log"]["entries"][0]
    entry["request"]["postData"] = {"params": [{"name": "a b", "value": "1"}, {"name": "c"}]}
    entry["response"]["content"] = {"text": ANSWER}
    (exchange,) = exchanges(write(tmp_path / "a.har", har))
    assert (exchange.request.body, exchange.reply.body, exchange.reply.reason) == (
        b"a+b=1&c=",
        b'{"id": "1"}',
        "Created",
    )
    packed = gzip.compress(ANSWER.encode()).hex()
    pieces = {"response": [packed[:20], packed[20:]], "rawHeaders": ["Content-Encoding", "gzip"], "body": ""}
    items = [{**NOCK[0], **pieces}, {**NOCK[0], "response": "hello"}, {**NOCK[0], "response": [1, 2]}]
    binary = {**NOCK[0], "response": b"\x00\xff".hex(), "responseIsBinary": True}
    bodies = [one.reply.body for one in exchanges(write(tmp_path / "a.json", [*items, binary]))]
    assert bodies == [ANSWER.encode(), b"hello", b"[1,2]", b"\x00\xff"]
    assert exchanges(write(tmp_path / "a.yaml", {"version": 2, "interactions": []})) == []


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ({"mappings": [{"request": {"url": "/"}, "response": {"status": 200}}]}, "a mapping of WireMock"),
        ({"request": {"url": "/"}, "response": {"status": 200}}, "a mapping of WireMock"),
        ({"responses": [{"response": {"method": "GET", "url": URL}}]}, "a recording of `responses`"),
        ({"consumer": {}, "provider": {}, "interactions": [{"request": {"path": "/"}}]}, "a contract of Pact"),
        ({"info": {"schema": "v2.1.0"}, "item": []}, "a collection of Postman"),
        ({"data": {"pairs": []}, "meta": {}}, "a simulation of Hoverfly"),
        ({"version": 1, "interactions": {"a": {}}}, "a cassette whose interactions are a mapping"),
        ({"version": 7, "interactions": []}, "got version 7"),
    ],
)
def test_an_unsupported_tool_is_named(tmp_path: Path, document: Any, name: str) -> None:
    """Its file is reported neither as damaged nor as of a newer version."""
    with pytest.raises(CassetteRefusedError, match=name):
        read(write(tmp_path / "a.yaml", document))


@pytest.mark.parametrize("tool", ["HAR", "go-vcr 2", "nock"])
def test_another_tools_damaged_file(tmp_path: Path, tool: str) -> None:
    """The error names the tool."""
    document, name = json.loads(json.dumps(TOOLS[tool]))
    if tool == "HAR":
        del document["log"]["entries"][0]["request"]
    elif tool == "nock":
        document[0]["status"] = "none"
    else:
        document["interactions"].append({})
    with pytest.raises(
        CassetteDamagedError, match=r"Expected what (an HTTP archive|a cassette of go vcr|a recording of nock)"
    ):
        read(write(tmp_path / name, document))


def test_a_compressed_cassette_is_read(tmp_path: Path) -> None:
    """langchain-tests writes them; we never write one, and a decompression bomb is refused."""
    plain, packed = write(tmp_path / "a.yaml", R), tmp_path / "b.yaml.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert exchanges(packed) == exchanges(plain)
    plays: tuple[Mode, ...] = ("once", "none")
    for mode in plays:
        open_tape(packed, mode).close(warn=False)
    records: tuple[Mode, ...] = ("new_episodes", "all")
    for mode in records:
        with pytest.raises(ConfigError, match=r"convert it first: .*b\.yaml\.gz .*b\.yaml"):
            open_tape(packed, mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.yaml.gz"]
    assert find_cassettes([tmp_path]) == [plain, packed]
    packed.write_bytes(gzip.compress(plain.read_bytes())[:-9])
    with pytest.raises(CassetteDamagedError, match="Expected a whole gzip file"):
        read(packed)
    packed.write_bytes(gzip.compress(b"a" * (65 << 20)))
    with pytest.raises(CassetteRefusedError, match="Expected at most 64 MB"):
        read(packed)


def test_only_the_first_member_of_a_compressed_cassette_was_read(tmp_path: Path) -> None:
    """pigz and `cat` write several members; another compression is named."""
    plain, packed = write(tmp_path / "a.yaml", R), tmp_path / "b.yaml.gz"
    data = plain.read_bytes()
    packed.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    assert exchanges(packed) == exchanges(plain)
    packed.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:])[:-9])
    with pytest.raises(CassetteDamagedError, match="Expected a whole gzip file"):
        read(packed)
    packed.write_bytes(bz2.compress(data))
    with pytest.raises(CassetteRefusedError, match="packed by bzip2; unpack it"):
        read(packed)


def test_an_archive_without_bodies_played_empty_answers(tmp_path: Path) -> None:
    """Browsers export HTTP archives without answers' content by default."""
    har = json.loads(json.dumps(HAR))
    har["log"]["entries"][0]["response"]["content"] = {"size": 11, "mimeType": "application/json"}
    with pytest.raises(CassetteRefusedError, match="without that of https://api.example.com"):
        read(write(tmp_path / "a.har", har))
    har["log"]["entries"][0]["response"]["content"] = {"size": 0}
    assert [exchange.reply.body for exchange in exchanges(write(tmp_path / "a.har", har))] == [b""]


def test_files_of_vcrpy_before_version_1_were_reported_as_files_of_responses(tmp_path: Path) -> None:
    """Their addresses are in parts, their headers are lines."""
    asked = {"protocol": "https", "host": "api.example.com", "port": 443, "path": "/v1", "method": "GET", "body": None}
    answer = {"status": {"code": 200, "message": "OK"}, "headers": ["etag: a: b\r\n"], "body": {"string": "x"}}
    (exchange,) = exchanges(write(tmp_path / "a.json", [{"request": {**asked, "headers": {}}, "response": answer}]))
    assert canonical_url(exchange.request.url) == "https://api.example.com/v1"
    assert (exchange.reply.body, exchange.reply.headers["etag"]) == (b"x", "a: b")


def test_our_own_files_may_be_compressed(tmp_path: Path) -> None:
    """Compressing a cassette keeps its hash, which is checked."""
    path, packed = tmp_path / "a.yaml", tmp_path / "a.yaml.gz"
    tape = open_tape(path, "all")
    tape.record(tape.issue(HTTPRequest(url=URL, body=b"", headers={})), HTTPReply(status=200, body=b"", headers={}))
    tape.close()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    recording = read(packed)
    assert recording is not None
    assert recording.state == "closed"


def test_a_long_line_of_vcrpy_was_refused(tmp_path: Path) -> None:
    """An image or a video in base64 is one line of YAML."""
    body = '{"b64": "' + base64.b64encode(bytes(6_800_000)).decode() + '"}'
    item = {
        "request": {"method": "GET", "uri": URL, "body": None, "headers": {}},
        "response": {"status": {"code": 200, "message": "OK"}, "headers": {}, "body": {"string": body}},
    }
    path = tmp_path / "a.yaml"
    path.write_text(
        yaml.dump({"version": 1, "interactions": [item]}, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    )
    assert [exchange.reply.body for exchange in exchanges(path)] == [body.encode()]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_files_with_a_byte_order_mark_are_read(tmp_path: Path, encoding: str) -> None:
    """An editor may have written it."""
    path = tmp_path / "a.yaml"
    path.write_bytes(yaml.safe_dump(R).encode(encoding))
    assert len(exchanges(path)) == 1
