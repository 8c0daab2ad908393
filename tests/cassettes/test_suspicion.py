"""The quick search: if it finds nothing, the thorough one finds nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.cassettes import secrets
from aggregator.cassettes.redaction import redact_body
from aggregator.cassettes.secrets import has_hidden_text, needles_of, secret_edits, suspicious

QUOTES = ['"', '\\"', '\\\\"', '\\\\\\"']
NAMES = [
    *("api_key", "APIKEY", "PrivateKeY", "sessionToken", "client_secret", "SECRETS", "password", "passwd"),
    *("Passphrase", "authorization", "credentials", "x-oauth-token", "access_tokens", "refresh-tokens"),
    *("authorizations", "passwds", "passphrases", "subscription_keys", "clé_api_key"),
]
TOKENS = [
    *("sk-" + "a1" * 9, "AKIA" + "A" * 16, "eyJ" + "a" * 12 + "." + "b" * 12 + ".", "ghp_" + "a" * 20),
    *("hf_" + "bC" * 11, "xoxb-" + "1" * 16, "AIza" + "x" * 32, "glpat-" + "a" * 16, "ya29." + "a" * 22),
]
NEEDLES = needles_of(frozenset({"MYKEY-abc/def 12345", "abcdefgh", "MYKEY-abcdef~ghi~jkl-12345"}))
PEM = "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----\n"

fields = st.builds(
    lambda quote, name, space, value: f"{quote}{name}{quote}{space}:{value.replace('Q', quote)}",
    st.sampled_from(QUOTES),
    st.sampled_from(NAMES),
    st.sampled_from(["", " ", "\n", " " * 9]),
    st.sampled_from(["Qhunter2Q", "Qcut", "12345", "[Qa]bQ, QcQ]", '["a{b"]', "[1, 2]", "QQ", "null"]),
)
keys = st.sampled_from(["x", "MIIE" * 16, "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,01\n\nMIIE"]).map(PEM.format)
tokens = st.sampled_from([*TOKENS, *(needle.decode() for needle in NEEDLES)])
PIECES = [
    *("word+" * 90, "a" * 400, "a" * 30, "b/" * 300, "=" * 10, "~" * 5, "~", "+", "/", ".", "-", "_", "1", "é"),
    *("Bearer ", "basic ", "TOKEN  ", 'next_token": "', "n", "\n", "\r\n", "\\n", "\\", '"', "{", "[", "]", ":", " "),
]
words = st.sampled_from(PIECES)
bodies = st.lists(st.one_of(fields, keys, tokens, words), max_size=6).map("".join)


@given(bodies, st.integers(0, 2))
def test_the_quick_search_misses_nothing(body: str, depth: int) -> None:
    """Fields with any name and quotes, keys, tokens and long runs, bare and in JSON strings within JSON strings."""
    for _ in range(depth):
        body = json.dumps({"content": body}, ensure_ascii=False)
    data = body.encode()
    if not suspicious(data, NEEDLES) and not has_hidden_text(data):
        assert secret_edits(data, NEEDLES) == []


@given(st.text(alphabet="abcdefghijk sk-AIza_\"':{}[]\\,.~0123456789", max_size=200))
def test_the_quick_search_misses_nothing_in_noise(text: str) -> None:
    """Characters in random order."""
    data = text.encode()
    if not suspicious(data):
        assert secret_edits(data) == []


def test_the_quick_search_finds_every_name() -> None:
    """A field with a secret name is found, with white space before its colon and in JSON within JSON too."""
    names = [*NAMES, *(name for name in secrets.NAMES if "-" not in name)]
    bodies = [
        f"{{{quote}a{quote}: 1, {quote}{name}{quote}{space}:{quote}abc1-def2-ghi3{quote}}}".encode()
        for name in names
        for space in ("", " ", "\n", "\t", "\r\n  ", " " * 9)
        for quote in QUOTES
    ]
    assert [body for body in bodies if not (suspicious(body) and secret_edits(body))] == []
    assert len(bodies) > 2_000


@pytest.mark.parametrize("name", ["max_tokens", "prompt_tokens", "completion_tokens", "instructions", "phrases"])
def test_names_with_a_similar_ending_are_not_suspicious(name: str) -> None:
    """Every answer has token counts; a thorough search for each of them would be too slow."""
    assert not suspicious(f'{{"{name}": 5, "inner": "{{\\"{name}\\": 5}}"}}'.encode())


@pytest.mark.parametrize("headers", ["", "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,01\n\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_private_key_in_json_was_not_found(headers: str, line_end: str, depth: int) -> None:
    r"""Its line breaks are `\n` there, so no run of letters follows its beginning."""
    body = PEM.format(headers + "MIIE" * 16).replace("\n", line_end)
    for _ in range(depth):
        body = json.dumps({"content": body})
    assert suspicious(body.encode())
    clean = redact_body(body.encode(), ())[0]
    assert b"MIIE" not in clean
    assert b"-----BEGIN RSA PRIVATE KEY-----REDACTED-----END" in clean


def test_a_token_at_the_end_of_a_long_run_was_not_found() -> None:
    """A long form, or a long path, is one run; the search ended after 400 bytes."""
    assert suspicious(b"prompt=" + b"word+" * 100 + b"sk-proj-abcdef0123456789abcdef")


def test_a_bearer_token_with_a_tilde_was_not_found() -> None:
    """RFC 6750 allows it."""
    assert suspicious(b'{"m": "Authorization was Bearer abcdefghij~klmnopqrst~uv"}')
