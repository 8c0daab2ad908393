"""What counts as a secret and what does not, one case for each symptom."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator.cassettes.exchanges import Exchange, Facts, decode_line
from aggregator.cassettes.redaction import (
    inflated,
    needles_for,
    redact_body,
    redact_form,
    redact_line,
    redact_request,
    redact_text,
    redact_url,
)
from aggregator.cassettes.secrets import authenticating_values, needles_of, secret_edits
from aggregator.errors import SecretLeakError
from aggregator.records import HTTPReply, HTTPRequest

URL = "https://api.example.com/v1"
SECRET = "hunter2-hunter2"
REQUEST = HTTPRequest(url=URL, body=b"{}", headers={})
FORM = {"content-type": "Application/X-WWW-Form-Urlencoded"}


def clean(value: Any) -> Any:
    """Return a JSON value as it is written in a body."""
    return json.loads(redact_body(json.dumps(value).encode(), ())[0])


def written(reply: HTTPReply, request: HTTPRequest = REQUEST) -> HTTPReply:
    """Return a reply as a cassette stores it."""
    exchange = Exchange(request=redact_request(request), reply=reply, facts=Facts(lineage="", chunks=reply.chunks))
    return decode_line(redact_line(exchange, needles_for(request))).reply


@pytest.mark.parametrize(
    "name", ["access_tokens", "refresh_tokens", "session_tokens", "authorizations", "passwds", "passphrases"]
)
def test_plural_names_leaked(name: str) -> None:
    """Each element under a plural name is a secret."""
    for value, expected in ((SECRET, "REDACTED"), ([SECRET], ["REDACTED"])):
        reply = written(HTTPReply(status=200, body=json.dumps({name: value}).encode(), headers={}))
        assert json.loads(reply.body) == {name: expected}


@pytest.mark.parametrize("text", ["a]b", "a[b", "a{b", 'a"b', "a\\", "a\\]"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_bracket_in_a_list_of_secrets_hid_them(text: str, depth: int) -> None:
    """Strings of a list that look like secrets are redacted, whatever else it holds, also in JSON within JSON."""
    value: Any = {"api_keys": [text, SECRET, 7], "password": 12345678, "n": [text]}
    expected: Any = {"api_keys": [text, "REDACTED", 7], "password": 12345678, "n": [text]}
    for _ in range(depth):
        value, expected = {"arguments": json.dumps(value)}, {"arguments": json.dumps(expected)}
    assert clean(value) == expected


def test_a_rewritten_document_kept_lists_and_numbers() -> None:
    r"""If an edit would break an escape, the document is rewritten; lists and numbers were not redacted then."""
    body = rb'{"m": "\u0041BCDEFGHIJKLMNOP", "api_keys": [["a"], "hunter2-hunter2"], "password": 12, "ok": [1, true]}'
    redacted = redact_body(body, needles_of(frozenset({"41BCDEFGHIJKLMNOP"})))[0]
    assert json.loads(redacted) == {
        "m": "ABCDEFGHIJKLMNOP",
        "api_keys": [["a"], "REDACTED"],
        "password": 12,
        "ok": [1, True],
    }


def test_names_written_with_escapes_leaked() -> None:
    r"""`\u0061pi_key` is `api_key` to a JSON parser, and so it is in JSON within JSON."""
    assert json.loads(redact_body(rb'{"\u0061pi_key": "x", "n": 1}', ())[0]) == {"api_key": "REDACTED", "n": 1}
    body = json.dumps({"a": r'{"m": "\u006dYKEY-ABCDEF-9999"}'}).encode()
    assert b"ABCDEF" not in redact_body(body, needles_of(frozenset({"mYKEY-ABCDEF-9999"})))[0]
    harmless = json.dumps({"a": r'{ "m": "\u006d" }'}).encode()
    assert redact_body(harmless, ())[0] == harmless


@pytest.mark.parametrize("before", ["", "u:", "user:"])
def test_the_end_of_a_key_was_left_in_its_base64(before: str) -> None:
    """At each alignment only the characters remain that also hold a part of the text before or after the key."""
    key = "Q7xKp2RmZt9LsVbN4wYc8HdA"
    body = json.dumps({"note": base64.b64encode(f"{before}{key}!!".encode()).decode()}).encode()
    rest = json.loads(redact_body(body, needles_of(frozenset({key})))[0])["note"].split("REDACTED")
    assert len(rest) == 2
    assert len(rest[0]) <= len(before) * 8 // 6 + 1
    assert len(rest[1].rstrip("=")) <= 4


values = st.text(alphabet='ab\\"]}, :\n', min_size=1, max_size=8)


@given(values, values, st.integers(0, 3))
def test_a_password_that_ends_in_a_backslash_swallowed_the_next_field(secret: str, other: str, depth: int) -> None:
    """Only the value is redacted, at any depth of JSON within JSON; everything next to it is unchanged."""
    value: Any = {"password": secret, "city": other, "secret": "x"}
    expected: Any = {"password": "REDACTED", "city": other, "secret": "REDACTED"}
    for _ in range(depth):
        value, expected = {"text": json.dumps(value)}, {"text": json.dumps(expected)}
    assert clean(value) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"password": "hunter2', b'{"password": "REDACTED'),
        (b'{"api_keys": ["hunter2-hunter2", "hunter2-hun', b'{"api_keys": ["REDACTED", "REDACTED'),
        (rb'{"a": "{\"password\": \"hunter2"}', rb'{"a": "{\"password\": \"REDACTED"}'),
        (rb'"-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQ"', b'"-----BEGIN PRIVATE KEY-----REDACTED"'),
    ],
)
def test_a_value_truncated_before_its_quote_leaked(body: bytes, expected: bytes) -> None:
    """An answer that ends early, for example at the token limit, has no closing quote."""
    assert redact_body(body, ())[0] == expected


@pytest.mark.parametrize("unit", [b"\\", b"-----BEGIN PRIVATE KEY-----", b"-eyJ", b"-sk-", rb"\"api_key\": \"x\\"])
def test_a_model_that_loops_blocked_the_event_loop(unit: bytes) -> None:
    """The thorough search took quadratic time; a test of 300 kB would not have ended."""
    body = unit * (300_000 // len(unit))
    assert (secret_edits(body) == []) is (b"api_key" not in unit)


@pytest.mark.parametrize(
    "text",
    [
        "The app uses basic authentication/authorization for users.",
        "token classification/segmentation",
        '<div class="sk-text-repr-fallback">',
        '<input class="sk-toggleable__control sk-hidden--visually">',
        "def load_hf_tokenizer_and_model_pair(): hf_transformers_embedding_model = 1",
        "xai-explainability-framework",
    ],
)
def test_lower_case_words_were_redacted_as_tokens(text: str) -> None:
    """Names of CSS classes, packages and functions, and prose after the words basic and token, are not tokens."""
    assert clean({"content": text}) == {"content": text}


def test_words_with_digits_are_still_tokens() -> None:
    """No provider issues a key without a digit or a capital."""
    text = "basic dXNlcjpwYXNzd29yZA==abc1 token abcdefghijklmnopqrst1 sk-abcdefghijklmnopQ hf_abcdefghijklmnopqrst1"
    assert clean({"a": text}) == {"a": "basic REDACTED token REDACTED REDACTED REDACTED"}


@pytest.mark.parametrize("value", ["Basic é", "Bearer clé-secret-1234", "é"])
def test_a_key_beyond_ascii_raised_a_bare_error(value: str) -> None:
    """Text that is not base64 holds no password."""
    values = authenticating_values(URL, {"Authorization": value}, ())
    assert values == ({"clé-secret-1234"} if "clé" in value else set())


def test_an_invalid_address_raised_a_bare_error() -> None:
    """Another tool's cassette may hold any text as an address."""
    assert authenticating_values("http://[bad/?key=abcdefgh", {}, ()) == {"abcdefgh"}


def test_one_cookie_of_several_leaked() -> None:
    """Only a session cookie is searched for in texts; a theme is not a secret, and appears in prose."""
    request = replace(REQUEST, headers={"Cookie": f"theme=dark-mode-on; sid={SECRET}"})
    reply = HTTPReply(status=200, body=f"session {SECRET}, dark-mode-on".encode(), headers={})
    assert written(reply, request).body == b"session REDACTED, dark-mode-on"


def test_a_key_in_phps_json_leaked() -> None:
    r"""PHP writes a slash as `\/`."""
    request = replace(REQUEST, headers={"Authorization": "Bearer  abc/def+ghi/jklm/12345 "})
    reply = HTTPReply(status=401, body=rb'{"m": "bad key abc\/def+ghi\/jklm\/12345"}', headers={})
    assert written(reply, request).body == b'{"m": "bad key REDACTED"}'


def test_redirect_locations_leaked() -> None:
    """A redirect may contain a password, or a token in its fragment."""
    reply = HTTPReply(status=302, body=b"", headers={"location": "https://me:pw@files.example/x#access_token=abc&n=1"})
    assert written(reply).headers == {"location": "https://REDACTED@files.example/x#access_token=REDACTED&n=1"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://x.example/a?n=1#access_token=abc", "https://x.example/a?n=1#access_token=REDACTED"),
        ("https://me:hunter@2secret@x.example/a", "https://REDACTED@x.example/a"),
        ("https://x.example/a?api%5Fkey=abc#", "https://x.example/a?api%5Fkey=REDACTED#"),
        ("https://x.example/@me?n=a@b", "https://x.example/@me?n=a@b"),
    ],
)
def test_addresses_leaked(url: str, expected: str) -> None:
    """Secrets are found in fragments, in user information with an at sign, and under encoded names."""
    assert redact_url(url) == expected
    assert redact_text(f"cannot reach https://me:pw@{url[8:]}", ()).count("pw") == 0


def test_forms_leaked() -> None:
    """The content type may be in capitals, and a server that issues tokens may answer with a form."""
    body = b"access_token=abc&scope=read&user%5Bpassword%5D=abc"
    expected = b"access_token=REDACTED&scope=read&user%5Bpassword%5D=REDACTED"
    assert redact_request(replace(REQUEST, body=body, headers=FORM)).body == expected
    reply = written(HTTPReply(status=200, body=body, headers=FORM, chunks=((10, 1.0), (len(body) - 10, 2.0))))
    assert reply.body == expected
    assert sum(length for length, _ in reply.chunks) == len(expected)
    assert redact_form("no form at all") == "no form at all"


@pytest.mark.parametrize("level", range(1, 10))
def test_compressed_bodies_of_some_levels_leaked(level: int) -> None:
    """Each level of zlib has another header."""
    request = HTTPRequest(
        url=URL, body=zlib.compress(SECRET.encode(), level), headers={"authorization": f"Bearer {SECRET}"}
    )
    exchange = Exchange(request=request, reply=HTTPReply(status=200, body=b"", headers={}), facts=Facts(lineage=""))
    with pytest.raises(SecretLeakError, match=r"compressed request body \(a POST to api\.example\.com"):
        redact_line(exchange, needles_for(request))


def test_raw_deflate_and_later_members_were_not_searched() -> None:
    """A gzip file may have several members; deflate may have no header."""
    bare = zlib.compressobj(wbits=-15)
    assert inflated(bare.compress(b"hello " * 9) + bare.flush()) == b"hello " * 9
    assert inflated(gzip.compress(b"one ") + gzip.compress(b"two")) == b"one two"
    assert inflated("plain text, é".encode()) == inflated(b"plain") == b""
