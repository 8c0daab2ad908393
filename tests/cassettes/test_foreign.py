"""Reading what vcrpy wrote, and refusing malicious files."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import brotli
import pytest
import vcr.serialize
import yaml
import zstandard
from vcr.request import Request
from vcr.serializers import jsonserializer, yamlserializer

from aggregator.cassettes.blocks import read_blocks
from aggregator.cassettes.exchanges import Exchange
from aggregator.cassettes.foreign import Budget
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.storage import read
from aggregator.errors import CassetteDamagedError, CassetteRefusedError
from aggregator.records import HTTPRequest

URL = "https://api.example.com/v1/chat"
HOSTILE = {
    "code tag": "version: 1\ninteractions:\n- !!python/object/apply:os.mkdir [owned]\n",
    "code tag in a header": (
        "version: 1\ninteractions:\n- request: {method: GET, uri: 'http://x', body: null, headers: "
        "{a: [!!python/object/apply:os.mkdir [owned]]}}\n  response: {}\n"
    ),
    "code as a new object": "version: 1\ninteractions:\n- !!python/object/new:os.mkdir {args: [owned]}\n",
    "module": "version: 1\ninteractions: !!python/module:os ''\n",
    "name": "version: 1\ninteractions: [!!python/name:os.mkdir '']\n",
    "alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
        + "version: 1\ninteractions: *i\n"
    ),
    "alias of itself": "version: 1\ninteractions: &a [*a]\n",
    "depth": "version: 1\ninteractions: " + "[" * 100_000,
    "depth in JSON": '{"version": 1, "interactions": ' + "[" * 100_000,
    "deep blocks": "version: 1\ninteractions:\n" + "".join(" " * i + "-\n" for i in range(200)),
    "huge scalar": "version: 1\ninteractions:\n- request: '" + "x" * 20_000_000 + "'\n",
    "unknown tag": "version: 1\ninteractions: [!ruby/object:Gem::Installer {}]\n",
}


def one(path: Path) -> Exchange:
    recording = read(path)
    assert recording is not None
    (row,) = recording.rows
    return row.exchange()


def saved(path: Path, request: Request, response: dict[str, Any], serializer: Any = yamlserializer) -> Path:
    """Write a cassette with stock vcrpy."""
    path.write_text(vcr.serialize.serialize({"requests": [request], "responses": [response]}, serializer))
    return path


def response(body: bytes | str, **headers: str) -> dict[str, Any]:
    return {
        "status": {"code": 201, "message": "Created"},
        "headers": {"Content-Type": ["application/json"], **{name: [value] for name, value in headers.items()}},
        "body": {"string": body},
    }


@pytest.mark.parametrize("serializer", [yamlserializer, jsonserializer], ids=["yaml", "json"])
def test_a_stock_vcrpy_cassette_is_played(tmp_path: Path, serializer: Any) -> None:
    """YAML or JSON, it plays identical requests in the order of the file."""
    requests = [Request("POST", URL, b'{"q": "\xc3\xa9"}', {"Content-Type": "application/json"}) for _ in range(2)]
    answers = [response(b'{"n": 1}'), response('{"n": 2, "s": "\u00e9\\n"}'.encode())]
    path = tmp_path / "a.yaml"
    path.write_text(vcr.serialize.serialize({"requests": requests, "responses": answers}, serializer))
    tape = open_tape(path, "none")
    replies = [tape.play(tape.issue(HTTPRequest(url=URL, body='{"q":"é"}'.encode(), headers={}))) for _ in range(2)]
    assert [reply.body for reply in replies if reply] == [b'{"n": 1}', '{"n": 2, "s": "é\\n"}'.encode()]
    assert replies[0] is not None
    assert (replies[0].status, replies[0].reason, replies[0].headers) == (
        201,
        "Created",
        {"content-type": "application/json"},
    )
    tape.close()


@pytest.mark.requirement("client 15: gzip bytes are read")
@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(b'{"a": 1}')),
        ("deflate", zlib.compress(b'{"a": 1}')),
        ("deflate", zlib.compress(b'{"a": 1}')[2:-4]),
        ("br", brotli.compress(b'{"a": 1}')),
        ("zstd", zstandard.ZstdCompressor().compress(b'{"a": 1}')),
        ("gzip", b'{"a": 1}'),
    ],
    ids=["gzip", "zlib", "raw deflate", "brotli", "zstandard", "header kept, body decoded"],
)
def test_compressed_bodies_are_decompressed(tmp_path: Path, encoding: str, packed: bytes) -> None:
    """Bodies are decoded, and the content-encoding header is removed."""
    answer = response(packed, **{"Content-Encoding": encoding})
    reply = one(saved(tmp_path / "a.yaml", Request("POST", URL, b"{}", {}), answer)).reply
    assert (reply.body, "content-encoding" in reply.headers) == (b'{"a": 1}', False)


def test_a_compression_bomb_is_refused(tmp_path: Path) -> None:
    """A body that decompresses to more than the limit is refused."""
    answer = response(gzip.compress(bytes(40 << 20)), **{"Content-Encoding": "gzip"})
    with pytest.raises(CassetteRefusedError, match="unpacks to more"):
        one(saved(tmp_path / "a.yaml", Request("POST", URL, b"{}", {}), answer))


@pytest.mark.parametrize(
    ("body", "bytes_on_the_wire"),
    [
        (io.BytesIO(b"file"), b"file"),
        (iter([b"a", b"b"]), b"ab"),
        ({"q": 1}, b'{"q": 1}'),
        (None, b""),
        (b"\xff\x00", b"\xff\x00"),
    ],
    ids=["file", "iterator", "mapping", "none", "binary"],
)
def test_request_bodies_of_every_type(tmp_path: Path, body: Any, bytes_on_the_wire: bytes) -> None:
    """Files, iterators, JSON that was recorded as a mapping, no body, and bytes."""
    exchange = one(saved(tmp_path / "a.yaml", Request("POST", URL, body, {}), response(b"{}")))
    assert exchange.request.body == bytes_on_the_wire


BLOCK = """
version: 1
interactions:
- request:
    {request}
    headers: {headers}
    method: POST
    uri: https://api.example.com/v1/chat
  response:
    {response}
    headers: {{}}
    status: {{code: 200, message: OK}}
"""


@pytest.mark.requirement("client 15: istr tags are read")
@pytest.mark.parametrize(
    "headers",
    [
        "{!!python/object/new:multidict._multidict.istr [Accept]: ['*/*']}",
        "{!!python/object/new:multidict._istr.istr {args: [Accept]}: ['*/*']}",
        "{!!python/unicode Accept: !!python/tuple ['*/*']}",
        "{!!binary QWNjZXB0: [!binary Ki8q]}",
        "{Accept: '*/*'}",
        "[[Accept, '*/*']]",
    ],
)
def test_header_names_of_every_type(tmp_path: Path, headers: str) -> None:
    """istr tags of aiohttp, tuples, Ruby's !binary, plain values and pairs."""
    path = tmp_path / "a.yaml"
    path.write_text(BLOCK.format(request="body: '{}'", response="body: {string: ''}", headers=headers))
    assert one(path).request.headers == {"accept": "*/*"}


@pytest.mark.requirement("client 15: parsed_body is read")
def test_parsed_bodies_are_encoded_again(tmp_path: Path) -> None:
    """`parsed_body`, a body's JSON instead of its text, is read as the body."""
    path = tmp_path / "a.yaml"
    parsed = "parsed_body: {model: m, messages: [{content: 'a: b'}]}"
    path.write_text(BLOCK.format(request=parsed, response=parsed, headers="{}"))
    exchange = one(path)
    for body in (exchange.request.body, exchange.reply.body):
        assert json.loads(body) == {"model": "m", "messages": [{"content": "a: b"}]}


@pytest.mark.requirement("client 15: content and status_code are read")
@pytest.mark.parametrize(("content", "body"), [("'hi é'", "hi é".encode()), ("!!binary aGk=", b"hi"), ("''", b"")])
def test_httpx_responses_of_older_vcrpys(tmp_path: Path, content: str, body: bytes) -> None:
    """They have `content` and `status_code` instead of `body` and `status`, and a header for decompressed bytes."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "version: 1\ninteractions:\n- request: {body: '{}', headers: {}, method: POST, uri: 'https://x.example/v1'}\n"
        f"  response: {{content: {content}, headers: {{content-encoding: [gzip]}}, http_version: HTTP/1.1, "
        "status_code: 429}\n"
    )
    reply = one(path).reply
    assert (reply.status, reply.body, reply.headers) == (429, body, {})


@pytest.mark.requirement("client 15: Ruby's !binary is read")
def test_ruby_cassettes_are_read(tmp_path: Path) -> None:
    """Ruby VCR's format: `http_interactions`, bodies with an encoding, `!binary`."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "---\nhttp_interactions:\n- request:\n    method: post\n    uri: https://api.example.com/v1/chat\n"
        "    body:\n      encoding: UTF-8\n      string: '{}'\n    headers: {}\n"
        "  response:\n    status:\n      code: 200\n      message: OK\n    headers: {}\n"
        "    body:\n      encoding: ASCII-8BIT\n      string: !binary |-\n        aGVsbG8=\n"
        "  recorded_at: Tue, 01 Nov 2011 04:58:44 GMT\nrecorded_with: VCR 2.0.0\n"
    )
    exchange = one(path)
    assert (exchange.request.method, exchange.reply.body) == ("POST", b"hello")


def test_aliases_that_vcrpy_emits_are_read(tmp_path: Path) -> None:
    """The few aliases that PyYAML writes for shared objects are not a bomb."""
    shared = ["application/json"]
    interaction = {
        "request": {"method": "POST", "uri": URL, "body": "{}", "headers": {"accept": shared}},
        "response": {
            "status": {"code": 200, "message": ""},
            "headers": {"content-type": shared},
            "body": {"string": ""},
        },
    }
    path = tmp_path / "a.yaml"
    path.write_text(yaml.dump({"version": 1, "interactions": [interaction, interaction]}))
    assert "*id" in path.read_text()
    recording = read(path)
    assert recording is not None
    assert [row.facts.ticket for row in recording.rows] == [0, 1]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code tags, bombs, deep nesting and huge scalars are refused, and no code runs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(HOSTILE[name])
    with pytest.raises((CassetteRefusedError, CassetteDamagedError)) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "owned").exists()


MEASURE = """
import sys
from pathlib import Path
import yaml
from aggregator.cassettes.storage import read
from aggregator.errors import CassetteError

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

read(Path(sys.argv[1]))
before = peak()
for name in sys.argv[2:]:
    try:
        read(Path(name))
    except CassetteError:
        print("refused")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_hostile_files_need_little_memory(tmp_path: Path) -> None:
    """All of them are refused within 64 MB."""
    good = saved(tmp_path / "good.yaml", Request("POST", URL, b"{}", {}), response(b"{}"))
    paths = [tmp_path / f"{index}.yaml" for index in range(len(HOSTILE))]
    for path, text in zip(paths, HOSTILE.values(), strict=True):
        path.write_text(text)
    out = subprocess.run([sys.executable, "-c", MEASURE, good, *paths], capture_output=True, text=True, check=True)
    *refused, megabytes = out.stdout.split()
    assert len(refused) == len(HOSTILE)
    assert float(megabytes) <= 64


@pytest.mark.parametrize(
    "text", ["hello", "version: 1\n", "interactions: 5\n", "interactions:\n- request: {}\n", "a: [", "\x00"]
)
def test_a_file_that_is_not_a_cassette_is_an_error(tmp_path: Path, text: str) -> None:
    """The error names the file and the remedy."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(CassetteDamagedError, match=r"a\.yaml") as caught:
        read(path)
    assert "Expected" in str(caught.value)


def test_new_episodes_extend_a_foreign_cassette(tmp_path: Path) -> None:
    """Another tool's exchanges are kept when new episodes are added, without their secrets."""
    path = saved(
        tmp_path / "a.yaml",
        Request("POST", URL, b'{"q": 1, "api_key": "abc"}', {"Authorization": "Bearer x"}),
        response(b"old"),
    )
    tape = open_tape(path, "new_episodes")
    assert tape.play(tape.issue(HTTPRequest(url=URL, body=b'{"q":1,"api_key":"other"}', headers={}))) is not None
    slot = tape.issue(HTTPRequest(url=URL, body=b'{"q":2}', headers={}))
    assert tape.play(slot) is None
    tape.record(slot, one(path).reply)
    tape.close()
    recording = read(path)
    assert recording is not None
    assert [row.exchange().request.body for row in recording.rows] == [b'{"q":2}', b'{"q": 1, "api_key": "REDACTED"}'][
        ::-1
    ]
    assert "Bearer" not in path.read_text()


def test_check_finds_the_secrets_of_a_foreign_cassette(tmp_path: Path) -> None:
    """`check` reads what is really in a file; playing redacts it."""
    asked = Request("POST", URL + "?key=abc", b'{"api_key": "abc"}', {"Authorization": "Bearer abc"})
    path = saved(tmp_path / "a.yaml", asked, response(b"{}", **{"Set-Cookie": "id=abc"}))
    for redact in (True, False):
        recording = read(path, redact=redact)
        assert recording is not None
        line = bytes(recording.rows[0].line)
        assert line.count(b"abc") == (0 if redact else 4)


@pytest.mark.parametrize("x", ["x: {note: mine}", "x: hello", "x: [1]", "x: '{\"lineage\": 5}'"])
def test_another_tools_x_is_ignored(tmp_path: Path, x: str) -> None:
    """A key of that name that another tool wrote is not ours."""
    path = tmp_path / "a.yaml"
    block = BLOCK.format(request="body: '{}'", response="body: {string: hi}", headers="{}")
    path.write_text(f"{block}  {x}\n")
    assert one(path).reply.body == b"hi"


def test_a_key_in_the_header_was_kept_if_the_answer_quotes_it(tmp_path: Path) -> None:
    """The authentication header makes it a known secret, as while recording."""
    asked = Request("POST", URL, b"{}", {"Authorization": "Bearer MyCorpKey-abcdef123"})
    exchange = one(saved(tmp_path / "a.yaml", asked, response(b'{"error": "bad key MyCorpKey-abcdef123"}')))
    assert exchange.reply.body == b'{"error": "bad key REDACTED"}'


def test_one_body_under_many_aliases_used_all_memory() -> None:
    """A few kB may expand to gigabytes; the sum of all expanded bodies has a limit too."""
    item = (
        "- request: {method: GET, uri: 'http://x', body: null, headers: {}}\n"
        "  response: {status: {code: 200}, headers: {content-encoding: [gzip]}, body: {string: *b}}\n"
    )
    packed = base64.b64encode(gzip.compress(b"a" * 10_000)).decode()
    text = ("version: 1\ninteractions:\n" + item * 12).replace("*b", f"&b !!binary {packed}", 1)
    with pytest.raises(CassetteRefusedError, match=r"at most 100,000 bytes, got one that unpacks to more - at a:21;"):
        read_blocks(text.encode(), "a", intact=False, skipped=0, budget=Budget(total=100_000))
    assert len(read_blocks(text.encode(), "a", intact=False, skipped=0).rows) == 12


@pytest.mark.parametrize(
    ("before", "after"),
    [("uri: 'http://x'", "uri: 'http://[bad/'"), ("headers: {}}", "headers: {authorization: ['Basic é']}}")],
)
def test_an_odd_request_raised_a_bare_exception(tmp_path: Path, before: str, after: str) -> None:
    """Every type of address and key is handled."""
    text = (
        "version: 1\ninteractions:\n- request: {method: GET, uri: 'http://x', body: null, headers: {}}\n"
        "  response: {status: {code: 200}, headers: {}, body: {string: hi}}\n"
    )
    path = tmp_path / "a.yaml"
    path.write_text(text.replace(before, after))
    assert one(path).reply.body == b"hi"
    path.write_text(text.replace("code: 200", "code: .inf"))
    with pytest.raises(CassetteDamagedError, match=r"a\.yaml:3"):
        read(path)
