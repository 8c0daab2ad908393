"""Other clients' requests and answers converted to our records."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.cassettes.clients import FAMILIES, families, from_reply, to_bytes, to_reply, to_request
from aggregator.cassettes.lineage import is_passing, passing
from aggregator.cassettes.secrets import authenticating_values
from aggregator.errors import CassetteError, ConfigError
from aggregator.records import HTTPReply

URL = "http://127.0.0.1/v1"


def reply(body: bytes, **headers: str) -> HTTPReply:
    return to_reply(200, "OK", [(name.replace("_", "-"), value) for name, value in headers.items()], body)


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        ("all", set(FAMILIES)),
        (["httpx"], {"httpx"}),
        ("openai", {"aiohttp", "httpx", "urllib3"}),
        (["bedrock", "requests"], {"boto3", "urllib3"}),
        ((), set()),
    ],
)
def test_a_librarys_name_covers_its_clients(clients: Any, expected: set[str]) -> None:
    """`clients` takes "all", a name or a list; a library's name covers every client that may carry its requests."""
    assert families(clients) == expected


def test_an_unknown_client_lists_the_known_ones() -> None:
    """A wrong name is an error that lists the valid ones."""
    with pytest.raises(ConfigError, match=r"names of aiobotocore, aiohttp, .* got 'curl'"):
        families(["httpx", "curl"])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (None, b""),
        (b"raw", b"raw"),
        (bytearray(b"raw"), b"raw"),
        ("text ä", "text ä".encode()),
        ({"model": "m"}, b'{"model": "m"}'),
        ([1, 2], b"[1, 2]"),
        (io.BytesIO(b"file"), b"file"),
        (iter([b"a", "b"]), b"ab"),
    ],
)
def test_bodies_are_bytes(body: Any, expected: bytes) -> None:
    """Whatever type a client passes as a body, the tape gets the bytes that would be sent."""
    assert to_bytes(body, URL) == expected


def test_an_opaque_body_is_refused() -> None:
    """A body that cannot be read is an error with the address and the remedy, not a key that matches anything."""
    with pytest.raises(CassetteError, match=r"got object - at http://127.0.0.1/v1; .* send bytes"):
        to_bytes(object(), URL)


def test_headers_are_text() -> None:
    """Clients pass headers as text or bytes; the redaction, which searches them for secrets, gets text."""
    headers = {"Authorization": "Bearer canary-number-1", "x-api-key": b"canary-number-2", "x-retry": 3}
    request = to_request("POST", URL + "?api_key=canary-number-3&page=2", b"", headers)
    assert dict(request.headers) == {**headers, "x-api-key": "canary-number-2", "x-retry": "3"}
    values = authenticating_values(request.url, request.headers, request.secrets)
    assert values == {"canary-number-1", "canary-number-2", "canary-number-3"}


def test_an_unknown_coding_keeps_its_header() -> None:
    """Bytes of an unknown coding are kept as they are, with their header, so that the same client can decode them."""
    assert reply(b"\xff\xfe\x00", Content_Encoding="unknown").headers == {"content-encoding": "unknown"}


@given(st.binary())
def test_bodies_survive_the_round_trip(body: bytes) -> None:
    """What was recorded is played byte for byte, with the right content length."""
    played = from_reply(reply(body, Content_Length="999", Transfer_Encoding="chunked", X_Id="7"))
    assert played["body"]["string"] == body
    assert played["headers"] == {"x-id": ["7"], "content-length": [str(len(body))]}


def test_passing_is_for_its_block_only() -> None:
    """Requests inside the block bypass the tape; the one after it does not."""
    assert not is_passing()
    with passing():
        assert is_passing()
    assert not is_passing()
