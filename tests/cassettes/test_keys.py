"""Keys and lineage: which requests are the same, and where in the run they are."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aggregator.cassettes.lineage import current_lineage, current_role, lineage
from aggregator.cassettes.matching import canonical, parse_ignore, request_key
from aggregator.errors import ConfigError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def shuffled(value: Any) -> Any:
    """Reverse the order of every mapping's keys."""
    if isinstance(value, dict):
        return {name: shuffled(item) for name, item in reversed(value.items())}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_order_of_keys_and_white_space_are_ignored(value: Any) -> None:
    """The same JSON has the same key, however it is written."""
    written = json.dumps(value).encode()
    other = json.dumps(shuffled(value), indent=2, ensure_ascii=False).encode()
    assert request_key("POST", "u", written) == request_key("POST", "u", other)


@given(JSON, JSON)
def test_other_values_have_other_keys(a: Any, b: Any) -> None:
    """Two different bodies have two keys; 1, 1.0 and true are three values."""
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (
        request_key("POST", "u", json.dumps(a).encode()) == request_key("POST", "u", json.dumps(b).encode())
    ) == same


def test_method_and_url_are_part_of_the_key() -> None:
    """A change of either gives another key."""
    assert len({request_key(method, url, b"") for method in ("GET", "POST") for url in ("a", "b")}) == 4


@pytest.mark.parametrize("body", [b"", b"a=1&b=2", b"\xff", b"{", b"[" * 100_000, b'{"a": "\xff"}'])
def test_other_bodies_are_used_unchanged(body: bytes) -> None:
    """A body that is not JSON is its own canonical form."""
    assert canonical(body) == body


PARTS = [(b'form-data; name="file"; filename="a.mp3"', b"\x00\xff--" * 9), (b'form-data; name="model"', b"w")]


def multipart(boundary: bytes, parts: list[tuple[bytes, bytes]] = PARTS, extra: bytes = b"") -> bytes:
    written = [
        b"--%b\r\nContent-Disposition: %b\r\n%b\r\n%b\r\n" % (boundary, head, extra, body) for head, body in parts
    ]
    return b"".join(written) + b"--%b--\r\n" % boundary


def test_uploads_written_by_python_email_were_misses() -> None:
    """Lines may end in LF alone, as googleapiclient sends them, and text may precede the first part."""
    plain = canonical(multipart(b"another"))
    for boundary in (b"x", b"===============8437==", b"--"):
        kind = f'multipart/related; charset=utf-8; boundary="{boundary.decode()}"'
        assert canonical(multipart(boundary).replace(b"\r\n", b"\n"), (), kind) == plain
        assert canonical(multipart(boundary).replace(b"\r\n", b"\n")) == plain
        assert canonical(b"a preamble\r\n" + multipart(boundary) + b"an epilogue", (), kind) == plain
    inner = b"Content-Type: multipart/mixed;\n boundary=%b\n\n--%b\n\n1\n--%b--\n"
    one, two = (b"--o\n%b\n--o--" % (inner % (name, name, name)) for name in (b"first", b"second"))
    assert canonical(one) == canonical(two)


@example(b"x--")
@given(st.from_regex(rb"[0-9A-Za-z'()+_,./:=?-]{1,60}", fullmatch=True))
def test_a_random_boundary_made_every_upload_a_miss(boundary: bytes) -> None:
    """The boundary is ignored, and so is a part's content length."""
    assert canonical(multipart(boundary)) == canonical(multipart(b"another"))
    assert canonical(multipart(boundary, extra=b"Content-Length: 36\r\n")) == canonical(multipart(b"another"))
    assert canonical(multipart(boundary, [])) == canonical(multipart(b"another", []))


@pytest.mark.parametrize(
    "parts",
    [
        [PARTS[0]],
        PARTS[::-1],
        [(PARTS[0][0], PARTS[0][1] + b"x"), PARTS[1]],
        [(PARTS[0][0].replace(b"a.mp3", b"b.mp3"), PARTS[0][1]), PARTS[1]],
        [(PARTS[0][0].replace(b"file", b"image"), PARTS[0][1]), PARTS[1]],
        [PARTS[0], (PARTS[1][0], b"v")],
    ],
)
def test_uploads_differ_by_their_parts(parts: list[tuple[bytes, bytes]]) -> None:
    """Content, name, filename and number of the parts are compared."""
    assert canonical(multipart(b"b", parts)) != canonical(multipart(b"b"))


def test_json_within_a_part_is_canonical_too() -> None:
    """Uploads to Google and OpenAI have JSON metadata."""
    one, two = ([(b'form-data; name="m"', body)] for body in (b'{"a": 1, "b": 2}', b'{"b":2,"a":1}'))
    assert canonical(multipart(b"x", one)) == canonical(multipart(b"y", two))


@pytest.mark.parametrize("body", [b"--", b"--x", b"--x\r\nno end", b"--x--\r\nmore", b"-- a signature\r\n\r\nmore"])
def test_text_that_begins_like_an_upload_is_text(body: bytes) -> None:
    """Without its closing boundary it is not a multipart body."""
    assert canonical(body) == body


def test_the_order_of_form_fields_is_ignored() -> None:
    """Repeated fields keep their order, and white space has two encodings."""
    kind = "application/x-www-form-urlencoded; charset=utf-8"
    assert canonical(b"b=2&a=1+1", (), kind) == canonical(b"a=1%201&b=2", (), kind)
    assert canonical(b"a=1&a=2", (), kind) != canonical(b"a=2&a=1", (), kind)
    assert canonical(b"a=&b=1", (), kind) != canonical(b"b=1", (), kind)


def test_ignored_paths() -> None:
    """Volatile fields are left out of the key, also in lists, and may be absent."""
    ignore = parse_ignore(["user", "messages.*.id", "a.b", "x.y.z"])
    one = b'{"user": "u1", "messages": [{"id": 1, "c": 2}], "a": {"b": 1}, "x": 5}'
    other = b'{"messages": [{"id": 9, "c": 2}], "a": {}, "x": 5, "user": null}'
    assert canonical(one, ignore) == canonical(other, ignore) == b'{"a":{},"messages":[{"c":2}],"x":5}'


async def test_tasks_keep_their_own_lineage() -> None:
    """Each task has its own lineage; a role lasts as long as its block."""
    paths = {}

    async def walk(name: str) -> None:
        with lineage(name, role="guide"):
            await asyncio.sleep(0)
            with lineage("a", "b"):
                await asyncio.sleep(0)
                paths[name] = (current_lineage(), current_role())

    with lineage("train"):
        async with asyncio.TaskGroup() as group:
            for name in ("x", "y"):
                group.create_task(walk(name))
    assert paths == {name: (f"train/{name}/a/b", "guide") for name in ("x", "y")}
    assert (current_lineage(), current_role()) == ("", "agent")


@pytest.mark.parametrize("part", ["", "a\nb"])
def test_invalid_lineage_parts(part: str) -> None:
    """A part that would make the lineage ambiguous is an error."""
    with pytest.raises(ConfigError, match="non-empty printable text"):
        lineage(part)


def test_a_compressed_body_differed_by_its_time() -> None:
    """gzip writes the time of compression; the content counts, in any JSON notation."""
    plain = b'{"b": 1, "a": "x"}'
    one, two = gzip.compress(plain, mtime=1), gzip.compress(b'{"a":"x","b":1}', mtime=2)
    assert canonical(one) == canonical(two) == canonical(plain)
    assert canonical(one) != canonical(gzip.compress(b'{"a": "y"}'))
    assert canonical(one[:-9] + b"cut") != canonical(one)
    assert canonical(b"\x1f\x8b no gzip") == b"\x1f\x8b no gzip"
