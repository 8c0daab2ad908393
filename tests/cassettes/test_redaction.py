"""Secrets never reach the disk, in any place; everything else is unchanged."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator.cassettes.credentials import is_worth_finding
from aggregator.cassettes.exchanges import Exchange, Facts, decode_line
from aggregator.cassettes.journal import Layout
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.matching import request_key
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.redaction import needles_for, redact_line, redact_request
from aggregator.cassettes.secrets import apply_edits, moved
from aggregator.cassettes.tape import NO_ANSWER, Tape
from aggregator.errors import APIConnectionError, SecretLeakError
from aggregator.records import HTTPReply, HTTPRequest

SECRET = "cnry-4f9d/Zq+7x=Kp21 b"
PLAIN = "canaryKJHGFDSAqwertyuiop0123456789"
JSON = {"content-type": "application/json"}
SSE = {"content-type": "text/event-stream"}
REQUEST = HTTPRequest(url="https://api.example.com/v1", body=b'{"q": 1}', headers=JSON, secrets=(PLAIN, SECRET))
REPLY = HTTPReply(status=200, reason="OK", body=b'{"a": 1}', headers=JSON)
Case = tuple[HTTPRequest, HTTPReply]


def request(**changes: Any) -> Case:
    return replace(REQUEST, **changes), REPLY


def reply(**changes: Any) -> Case:
    return REQUEST, replace(REPLY, **changes)


def events(text: str, size: int) -> bytes:
    """Stream a text in chunks, like a model's server."""
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    lines = [json.dumps({"choices": [{"index": 0, "delta": {"content": piece}}]}) for piece in pieces]
    return "".join(f"data: {line}\n\n" for line in (*lines, "[DONE]")).encode()


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(character):04x}" for character in text)


def places(secret: str) -> dict[str, Case]:
    """Return every place where one secret is put."""
    b64, as_json = base64.b64encode, json.dumps(secret)
    basic = b64(f"user:{secret}".encode()).decode()
    nested = json.dumps(json.dumps({"args": {"note": secret}}))
    return {
        "authorization": request(headers={**JSON, "Authorization": f"Bearer {secret}"}),
        "x-api-key": request(headers={**JSON, "x-api-key": secret}),
        "x-goog-api-key": request(headers={"X-Goog-Api-Key": secret}),
        "unknown request header": request(headers={"x-custom": secret}),
        "kept request header": request(headers={"accept": f"text/{secret}"}),
        "cookie": request(headers={"Cookie": f"session={secret}"}),
        "basic authorization": request(headers={"Authorization": f"Basic {basic}"}),
        "query": request(url=f"https://api.example.com/v1?key={quote(secret)}&alt=sse"),
        "query in plus style": request(url=f"https://api.example.com/v1?access_token={quote_plus(secret)}"),
        "query of another name": request(url=f"https://api.example.com/v1?note={quote(secret, safe='')}"),
        "path": request(url=f"https://api.example.com/bot{quote(secret, safe='')}/send"),
        "user and password": request(url=f"https://user:{quote(secret, safe='')}@api.example.com/v1"),
        "json field": request(body=f'{{"api_key": {as_json}}}'.encode()),
        "json field in a list": request(body=f'{{"a": [{{"client_secret": {as_json}}}]}}'.encode()),
        "json text": request(body=f'{{"messages": [{{"content": {json.dumps("my key is " + secret)}}}]}}'.encode()),
        "json key": request(body=f"{{{as_json}: 1}}".encode()),
        "json in json": request(body=f'{{"arguments": {nested}}}'.encode()),
        "json escapes": request(body=f'{{"a": "{escaped(secret)}"}}'.encode()),
        "form": request(
            body=f"a=1&api_key={quote_plus(secret)}".encode(),
            headers={"content-type": "application/x-www-form-urlencoded"},
        ),
        "form of another name": request(body=f"a={quote_plus(secret)}".encode()),
        "plain body": request(body=f"hello {secret} there".encode()),
        "binary body": request(body=b"\xff\x00" + secret.encode() + b"\xfe"),
        "base64 body": request(body=b'{"a": "' + b64(secret.encode()) + b'"}'),
        "base64, shifted by one": request(body=b'{"a": "' + b64(b"x" + secret.encode() + b"yz") + b'"}'),
        "base64, shifted by two": request(body=b'{"a": "' + b64(b"xx" + secret.encode() + b"y") + b'"}'),
        "base64 for urls": request(body=base64.urlsafe_b64encode(b">>>" + secret.encode())),
        "url-encoded body": request(body=quote(secret, safe="").encode()),
        "url-encoded in lower case": request(
            body=quote(secret, safe="").lower().encode() if secret.islower() else b"{}"
        ),
        "echo": reply(body=f'{{"error": {{"message": {json.dumps("wrong key: " + secret)}}}}}'.encode(), status=401),
        "echo of a header": reply(
            body=f'{{"headers": {{"Authorization": {json.dumps("Bearer " + secret)}}}}}'.encode()
        ),
        "echo in base64": reply(body=b'{"a": "' + b64(b"Authorization: " + secret.encode()) + b'"}'),
        "echo with json escapes": reply(body=f'{{"a": "{escaped(secret)}"}}'.encode()),
        "echo in html": reply(body=f"<p>{secret}</p>".encode(), headers={"content-type": "text/html"}, status=502),
        "echo in binary": reply(body=b"\x80" + secret.encode()),
        "reply json field": reply(body=f'{{"session_token": {as_json}}}'.encode()),
        "reply json in json": reply(body=f'{{"arguments": {nested}}}'.encode()),
        "reason": reply(reason=f"bad {secret}"),
        "kept reply header": reply(headers={"x-request-id": secret}),
        "reply header in base64": reply(headers={"x-request-id": b64(secret.encode()).decode()}),
        "rate limit header": reply(headers={"x-ratelimit-reset": secret}),
        "set-cookie": reply(headers={"set-cookie": f"sid={secret}; HttpOnly"}),
        "unknown reply header": reply(headers={"x-echo": secret}),
        "location": reply(headers={"location": f"https://x.example/?token={quote(secret)}"}),
        "stream, one event": reply(body=events(f"key {secret} end", 1000), headers=SSE),
        "stream, by 7": reply(body=events(f"the key is {secret}, they say", 7), headers=SSE),
        "stream, by 1": reply(body=events(f"{secret}", 1), headers=SSE),
        "stream, by 3, twice": reply(body=events(f"{secret}{secret}", 3), headers=SSE),
        "stream of plain text": reply(body=f"data: {secret}\n\ndata: [DONE]\n\n".encode(), headers=SSE),
        "stream, cut by chunks": reply(
            body=events(secret, 5), headers=SSE, chunks=((40, 1.0), (len(events(secret, 5)) - 40, 2.0))
        ),
        "stream, event name": reply(body=f"event: {secret}\ndata: {{}}\n\n".encode(), headers=SSE),
    }


PLACES = {
    f"{name} ({kind})": case
    for kind, secret in (("plain", PLAIN), ("odd", SECRET))
    for name, case in places(secret).items()
}


def traces(data: bytes) -> list[str]:
    """Return what is left of the secrets in a file, in any encoding."""
    text = data.decode()
    flat = "".join(text.split("\\")).replace('"', "")
    found = []
    for secret in (PLAIN, SECRET):
        forms = [secret, quote(secret), quote(secret, safe=""), quote_plus(secret), secret[::-1], escaped(secret)]
        forms += [base64.b64encode(b"x" * n + secret.encode()).decode()[4 : 4 * (len(secret) // 4)] for n in range(3)]
        found += [form for form in forms if form in text or form in flat]
    return found


def streamed_text(data: bytes) -> str:
    """Return a stream's text as a client joins it."""
    payloads = [line[6:] for line in data.decode(errors="replace").splitlines() if line.startswith('data: {"choices"')]
    return "".join(json.loads(payload)["choices"][0]["delta"]["content"] for payload in payloads)


def test_there_are_enough_places() -> None:
    """At least 50 places are tested, for a plain secret and for one that needs escapes."""
    assert len(places(PLAIN)) >= 50


def leaks(path: Path, name: str, layout: Layout) -> list[str]:
    """Return what of the secrets is in an exchange's files, and what is wrong with its replay."""
    asked, answered = PLACES[name]
    tape = open_tape(path, "all", layout=layout)
    tape.record(tape.issue(asked), answered)
    found = [f"in the journal: {trace}" for trace in traces(path.read_bytes())]
    tape.close()
    found += [f"in the cassette: {trace}" for trace in traces(path.read_bytes())]
    recorded = open_tape(path, "none")
    played = recorded.play(recorded.issue(asked))
    recorded.close()
    if played is None:
        return [*found, "not played"]
    found += [f"played: {secret}" for secret in (PLAIN, SECRET) if secret in streamed_text(played.body)]
    if sum(length for length, _ in played.chunks) not in (0, len(played.body)):
        found.append("the chunks are not the body")
    return found


@pytest.mark.filterwarnings("ignore:.*changed by the redaction:aggregator.errors.CassetteWarning")
@pytest.mark.requirement("client 15: secrets are redacted")
@pytest.mark.parametrize("layout", ["journal", "readable"])
def test_no_secret_reaches_the_disk(tmp_path: Path, layout: Layout) -> None:
    """An authentication value is in no file: neither in the journal nor in the finished cassette."""
    found = {name: leaks(tmp_path / f"{i}.yaml", name, layout) for i, name in enumerate(PLACES)}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_failures_show_no_secret() -> None:
    """The message of a failed connection is redacted, including its URL."""
    lines: list[bytes] = []
    tape = Tape(sink=lines)
    slot = tape.issue(REQUEST)
    lost = APIConnectionError(f"cannot reach https://x.example/?key=abcdef with {PLAIN}")
    tape.record(slot, NO_ANSWER, failure=lost)
    assert decode_line(lines[0]).facts.error == (
        "APIConnectionError",
        "cannot reach https://x.example/?key=REDACTED with REDACTED",
    )


def in_lineage(tape: Tape) -> None:
    with lineage(f"user={PLAIN}"):
        tape.record(tape.issue(REQUEST), REPLY)


def packed(tape: Tape) -> None:
    tape.record(tape.issue(replace(REQUEST, body=gzip.compress(PLAIN.encode()))), REPLY)


def packed_reply(tape: Tape) -> None:
    tape.record(tape.issue(REQUEST), replace(REPLY, body=gzip.compress(PLAIN.encode())))


@pytest.mark.parametrize("leak", [in_lineage, packed, packed_reply])
def test_an_exchange_that_cannot_be_redacted_is_refused(leak: Callable[[Tape], None]) -> None:
    """Nothing is written, the answer stays in memory, the message is clean, and closing raises again."""
    lines: list[bytes] = []
    tape = Tape(sink=lines)
    with pytest.raises(SecretLeakError) as caught:
        leak(tape)
    assert PLAIN not in str(caught.value)
    assert lines == []
    assert len(tape.unsaved) == 1
    with pytest.raises(SecretLeakError):
        tape.close()


@pytest.mark.parametrize(
    "token",
    [
        "sk-proj-abcdefghijklmnopqrstuvwx0123",
        "sk-ant-api03-abcdefghijklmnopqrstuvwxyz-AA",
        "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "hf_abcdefghijklmnopqrstuvwxyzABCDEF",
        "gsk_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAIOSFODNN7EXAMPLE",
        "xoxb-123456789012-abcdefghijkl",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    ],
)
def test_tokens_are_recognised_by_their_pattern(token: str) -> None:
    """An undeclared token is redacted in a prompt and in a reply."""
    body = json.dumps({"content": f"line\n{token}\nuse it"}).encode()
    clean = redact_request(HTTPRequest(url="https://x.example", body=body, headers={}))
    assert json.loads(clean.body) == {"content": "line\nREDACTED\nuse it"}
    line = redact_line(decode_line(redact_line(exchange_of(HTTPReply(status=200, body=body, headers={})))))
    assert token.encode() not in line


def exchange_of(reply: HTTPReply) -> Any:
    lines: list[bytes] = []
    tape = Tape(sink=lines)
    tape.record(tape.issue(HTTPRequest(url="https://x.example", body=b"{}", headers={})), replace(reply, body=b""))
    return replace(decode_line(lines[0]), reply=reply)


@pytest.mark.parametrize(
    ("body", "clean"),
    [
        ('{"api_key": "abc"}', '{"api_key": "REDACTED"}'),
        ('{"OPENAI_API_KEY" : "a\\"b\\\\"}', '{"OPENAI_API_KEY" : "REDACTED"}'),
        ('{"apiKeys": ["a1b2c3d4", "b"]}', '{"apiKeys": ["REDACTED", "b"]}'),
        (
            '{"a": "{\\"password\\": \\"x\\", \\"b\\": \\"\\"}"}',
            '{"a": "{\\"password\\": \\"REDACTED\\", \\"b\\": \\"\\"}"}',
        ),
        ('{"token": "a1b2c3d4e5f6a7b8c9d0e1f2"}', '{"token": "REDACTED"}'),
    ],
)
def test_fields_are_recognised_by_their_name(body: str, clean: str) -> None:
    """A field with a secret name loses its value; the rest is the same JSON."""
    redacted = redact_request(HTTPRequest(url="https://x.example", body=body.encode(), headers={})).body
    assert redacted.decode() == clean
    json.loads(redacted)


@pytest.mark.parametrize(
    "body",
    [
        '{"max_tokens": 5, "usage": {"prompt_tokens": 3}}',
        '{"logprobs": [{"token": "Hello", "logprob": -0.1, "top_logprobs": []}]}',
        '{"properties": {"password": {"type": "string"}, "api_key": {"type": "string", "description": "the key"}}}',
        '{"api_key": "", "password": null, "secret": true}',
        '{"password": 12345, "session_tokens": 1532, "authorizations": [1, 2, 3]}',
        '{"prior_authorization": "approved", "credentials": ["MD", "PhD"], "secrets": ["Be patient", "Work hard"]}',
        '{"prompt_cache_key": "a", "key": "value", "keywords": ["x"], "author": "me", "tokenizer": "bpe"}',
        '{"content": "the task-oriented sk-learn risk-assessment-of-something"}',
        '{"id": "chatcmpl-9aBcDeFgHiJkLmNoPqRsTuVwXyZ01", "system_fingerprint": "fp_0123456789abcdef"}',
    ],
)
def test_harmless_values_are_unchanged(body: str) -> None:
    """Token counts, logprobs, schemas, empty values and ids are unchanged byte for byte."""
    assert redact_request(HTTPRequest(url="https://x.example", body=body.encode(), headers={})).body == body.encode()


@pytest.mark.parametrize("secret", ["EMPTY", "test", "x"])
def test_placeholders_are_not_secrets(secret: str) -> None:
    """A placeholder key does not change ordinary text."""
    asked = HTTPRequest(
        url="https://x.example", body=b'{"q": "a test of EMPTY text, x"}', headers={}, secrets=(secret,)
    )
    assert redact_request(asked).body == asked.body


def test_a_redacted_request_has_the_same_key(tmp_path: Path) -> None:
    """A request with a secret matches with another secret of the same name, and without the value."""
    path = tmp_path / "a.yaml"
    asked = HTTPRequest(url="https://x.example/v1?key=first-secret", body=b'{"api_key": "first", "q": 1}', headers={})
    tape = open_tape(path, "once")
    tape.record(tape.issue(asked), REPLY)
    tape.close()
    other = replace(asked, url="https://x.example/v1?key=REDACTED", body=b'{"q":1,"api_key":"second"}')
    for same in (asked, other):
        tape = open_tape(path, "none")
        assert tape.play(tape.issue(same)) is not None
        tape.close()


@given(st.text(), st.text(min_size=8, alphabet=st.characters(codec="utf-8")))
def test_redaction_is_idempotent(text: str, secret: str) -> None:
    """After one or two redactions the text is the same, the secret is gone, and the key is stable."""
    body = json.dumps({"content": f"{text} {secret} {text}"}).encode()
    asked = HTTPRequest(url="https://x.example", body=body, headers={}, secrets=(secret,))
    once = redact_request(asked)
    twice = redact_request(once, needles_for(asked))
    assert once.body == twice.body
    if is_worth_finding(secret) and secret not in text and secret not in "REDACTED":
        assert secret not in json.loads(once.body)["content"].replace("REDACTED", "\0")
    assert request_key("POST", "u", once.body) == request_key("POST", "u", twice.body)


@given(
    st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(1, 5)), max_size=4), st.integers(0, 60)
)
def test_chunk_boundaries_move_with_edits(data: bytes, cuts: list[tuple[int, int]], border: int) -> None:
    """Text before a boundary outside all edits is before it afterwards."""
    edits, end = [], 0
    for start, length in sorted(cuts):
        if start >= end and start + length <= len(data):
            edits.append((start, start + length, b"REDACTED"))
            end = start + length
    border = min(border, len(data))
    if not any(start < border < stop for start, stop, _ in edits):
        before = [edit for edit in edits if edit[1] <= border]
        assert apply_edits(data, edits)[: moved(border, edits)] == apply_edits(data[:border], before)


def test_a_head_with_bytes_that_are_not_utf8_was_not_recorded() -> None:
    """Servers send Latin-1 in headers and reasons; aiohttp passes it on as surrogates, which no file can hold."""
    there = replace(REPLY, reason="D\udce9j\xe0", headers={"x-request-id": "caf\udce9"})
    written = decode_line(
        redact_line(Exchange(request=REQUEST, reply=there, facts=Facts(lineage="")), needles_for(REQUEST))
    )
    assert (written.reply.reason, written.reply.headers) == ("D\ufffdj\xe0", {"x-request-id": "caf\ufffd"})
