"""Answers that redaction must not change, secrets that it must find, and its report of changes."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qsl, quote_plus

import pytest

from aggregator.cassettes.credentials import USUAL, Redaction, redaction_by
from aggregator.cassettes.exchanges import Exchange, Facts, decode_line, index_lines
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.redaction import needles_for, redact_body, redact_line, redact_request
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.secrets import needles_of, secret_edits
from aggregator.cassettes.tape import Tape
from aggregator.cli._exchanges import secrets_in
from aggregator.errors import CassetteWarning, ConfigError
from aggregator.records import HTTPReply, HTTPRequest

URL = "https://api.example.com/v1"
JSON = {"content-type": "application/json"}
PATTERN: Any = re.compile(r"\bcase-\d{6}\b")


def answered(body: Any, *, secrets: tuple[str, ...] = (), policy: Redaction = USUAL, **reply: Any) -> HTTPReply:
    """Return an answer as a cassette stores it."""
    request = HTTPRequest(url=URL, body=b"{}", headers=JSON, secrets=secrets, method=reply.pop("method", "POST"))
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    exchange = Exchange(
        request=redact_request(request, policy=policy),
        reply=HTTPReply(status=200, body=data, headers=reply.pop("headers", JSON)),
        facts=Facts(lineage=""),
    )
    return decode_line(redact_line(exchange, needles_for(request), policy)).reply


@pytest.mark.parametrize(
    "key",
    [
        *("anything", "lm-studio", "not-needed", "sk-no-key-required", "placeholder", "ollama-local", "EMPTY_KEY"),
        *("your-api-key-here", "sk-xxxxxxxxxxxxxxxx", "dummy_key_for_tests", "OpenAI-Compatible"),
        *("1234567890", "00000000"),
    ],
)
def test_a_placeholder_key_was_removed_from_answers(key: str) -> None:
    """The placeholders of local servers and proxies are words, which answers contain too."""
    body = {"content": f"Do you need {key} else? {key}s, {key.replace('-', ' ')}, un{key}"}
    assert json.loads(answered(body, secrets=(key,)).body) == body


@pytest.mark.parametrize("key", ["hunter2-hunter2", "a1b2c3d4", "pass-20417766", "tr0ub4dor&3", "test-key-123"])
def test_a_short_key_is_redacted_as_a_whole_word_only(key: str) -> None:
    """It is found also after an escaped line break or an encoded space, but not within a longer word."""
    body = {"content": f"key\n{key}, '{key}' or x={key}; not x{key}, {key}9"}
    gone = {"content": f"key\nREDACTED, 'REDACTED' or x=REDACTED; not x{key}, {key}9"}
    assert json.loads(answered(body, secrets=(key,)).body) == gone
    assert answered(f"a%20{key}%22".encode(), secrets=(key,)).body == b"a%20REDACTED%22"


def test_bytes_of_an_image_were_redacted_as_a_password() -> None:
    """A slash, a slash and an at sign occur by chance in a few megabytes of compressed data."""
    noise = bytes.fromhex("c815 3a4a 4ea6 1674 7338 2f2f d34a 8967 ad05 2e06 e773 5948 6ab7 b5f5 409f")
    assert secret_edits(noise) == []
    assert secret_edits(b"\x00\xff" + noise + b" https://me:hunter2secret9@x.example/a \xff") != []


def test_base64_was_redacted_as_keys() -> None:
    """base64url contains `_sk-`, `-pk-` and the like by chance: signatures, inline data, encrypted reasoning."""
    random = Random(7)
    for _ in range(40):
        data = random.randbytes(60_000)
        for encoded in (base64.urlsafe_b64encode(data), base64.b64encode(data)):
            assert secret_edits(encoded) == []


@pytest.mark.parametrize(
    "text",
    [
        "AAAAAAAA_sk-B7cDAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "https://imgen.x.ai/xai-imgen/xai-tmp-imgen-4f9d0c1e-7d2c-4d1f-9b5e-0f1e2d3c4b5a.jpeg",
        "https://files.example/sk-1234567890abcdefABCDEF/report.pdf",
        "s3://bucket/AKIAIOSFODNN7EXAMPLE/x",
        "transformers.hf_Argument1ParserWithManyWords",
        "task-AKIAIOSFODNN7EXAMPLE",
        "req_sk-proj-abcdefghijklmnopqrstuvwx0123",
        "sk-abcdefghijklmnop1234.example.com",
        "AKIAIOSFODNN7EXAMPLE7",
        "x.eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    ],
)
def test_a_part_of_a_longer_name_was_redacted_as_a_token(text: str) -> None:
    """A token's pattern matches whole tokens only, not within base64, an address or a longer identifier."""
    body = {"content": f"see {text} there", "id": text}
    assert json.loads(answered(body).body) == body


@pytest.mark.parametrize("before", ["", " ", "\n", "(", "'", "=", ": ", "key=", "…"])
@pytest.mark.parametrize("after", ["", " ", "\n", ")", "'", ".", ", ", "…"])
def test_a_whole_token_is_redacted_in_any_context(before: str, after: str) -> None:
    """Prose, code and queries may surround it."""
    body = {"content": f"{before}sk-proj-abcdefghijklmnopqrstuvwx0123{after}"}
    assert json.loads(answered(body).body) == {"content": f"{before}REDACTED{after}"}


@pytest.mark.parametrize(
    "token",
    [
        "ABSK" + base64.b64encode(b"BedrockAPIKey-abcd-at-123456789012:" + bytes(range(32))).decode(),
        "bedrock-api-key-" + base64.b64encode(bytes(range(90))).decode(),
        "pcsk_5gH7kL_9mN2pQ4rS6tU8vW1xY3zA5bC7dE9f",
        "jina_0123456789abcdef0123456789abcdefABCDEFGH",
        "dckr_pat_a1B2c3D4e5F6g7H8i9J0k1L2m3N",
        "dapi0123456789abcdef0123456789abcdef-2",
        "dop_v1_" + "0123456789abcdef" * 4,
        "shpat_0123456789abcdef0123456789abcdef",
        "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",
    ],
    ids=lambda token: token[:5],
)
def test_keys_of_bedrock_and_others_were_not_redacted(token: str) -> None:
    """Bearer keys of Amazon Bedrock, which this library uses, and those of databases and services around models."""
    assert json.loads(answered({"content": f"use {token} now"}).body) == {"content": "use REDACTED now"}
    assert json.loads(answered({"content": f"see x{token}/y there"}).body) == {"content": f"see x{token}/y there"}


@pytest.mark.parametrize("start", ["sk_live_", "rk_test_", "npm_", "fw_", "lsv2_pt_", "tvly-", "csk-"])
def test_tokens_of_more_providers_were_not_redacted(start: str) -> None:
    """Stripe's, npm's, Fireworks', LangSmith's, Tavily's and Cerebras'."""
    body = {"content": f"use {start}abcdefghijklmnopqrstUVWX0123 now", "css": f"{start}primary-button-with-icon"}
    assert json.loads(answered(body).body) == body | {"content": "use REDACTED now"}


def test_secrets_in_xml_and_in_json_within_forms_were_not_redacted() -> None:
    """AWS returns credentials in XML; Slack and others expect a form with one field of JSON."""
    xml = b"<Result><Credentials><SecretAccessKey>x9Kp21/7fQz+Lm</SecretAccessKey>%b</Credentials></Result>"
    rest = b"<Expiration>2030-01-01T00:00:00Z</Expiration><Password>mellon</Password><Token>approved</Token>"
    assert answered(xml % rest).body == (xml % rest).replace(b"x9Kp21/7fQz+Lm", b"REDACTED")
    form = {"content-type": "application/x-www-form-urlencoded"}
    asked = b"a=1&payload=" + quote_plus('{"text": "a+b", "api_key": "x9Kp21-7fQz"}').encode()
    request = redact_request(HTTPRequest(url=URL, body=asked, headers=form))
    assert dict(parse_qsl(request.body.decode())) == {"a": "1", "payload": '{"text": "a+b", "api_key": "REDACTED"}'}
    kept = HTTPRequest(url=URL, body=b"a=1&payload=" + quote_plus('{"text":  1}').encode(), headers=form)
    assert redact_request(kept).body == kept.body


def calls(arguments: Any, *, text: str) -> list[Any]:
    """Return one tool call in several providers' formats; `text` are the same arguments as JSON."""
    return [
        {"choices": [{"message": {"tool_calls": [{"id": "c", "function": {"name": "open", "arguments": text}}]}}]},
        {"content": [{"type": "tool_use", "id": "t", "name": "open", "input": arguments}]},
        {"candidates": [{"content": {"parts": [{"functionCall": {"name": "open", "args": arguments}}]}}]},
        {"output": [{"type": "function_call", "call_id": "c", "name": "open", "arguments": text}]},
        {"output": {"message": {"content": [{"toolUse": {"toolUseId": "t", "name": "open", "input": arguments}}]}}},
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": text}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": text}]}]},
        {"input": [{"type": "function_call_output", "call_id": "c", "output": text}]},
        {"message": {"tool_calls": [{"function": {"name": "open", "arguments": arguments}}]}},
    ]


@pytest.mark.parametrize("call", range(9))
def test_tool_arguments_were_redacted_by_name(call: int) -> None:
    """The tool was called with `mellon`, so its replay has it too; a value that looks like a secret is redacted."""
    harmless: Any = {"passphrase": "mellon", "password": "open sesame", "api_key": "demo"}
    body = calls(harmless, text=json.dumps(harmless))[call]
    assert json.loads(answered(body).body) == body
    secret = {"passphrase": "x9Kp21-7fQz", "city": "Paris"}
    gone = {**secret, "passphrase": "REDACTED"}
    body, expected = (calls(one, text=json.dumps(one))[call] for one in (secret, gone))
    assert json.loads(answered(body).body) == expected


def test_streamed_tool_arguments_were_redacted_by_name() -> None:
    """The chunks of a stream are joined, and treated like arguments in one piece."""

    def stream(*pieces: str) -> bytes:
        delta = [{"type": "content_block_delta", "delta": {"partial_json": piece}} for piece in pieces]
        return "".join(f"data: {json.dumps(event)}\n\n" for event in delta).encode()

    body = stream('{"pass', 'word": "mel', 'lon"}')
    assert redact_body(body, ())[0] == body
    assert b"Kp21" not in redact_body(stream('{"pass', 'word": "x9Kp', '21-7fQz"}'), ())[0]


@pytest.mark.parametrize(
    "body",
    [
        {"prior_authorization": "approved", "authorizations": [1, 2, 3], "credentials": ["MD", "PhD"]},
        {"secrets": ["Be patient", "Work hard"], "session_tokens": 1532, "password": 12345678},
        {"api_key": None, "client_secret": {"type": "string"}, "secret": True, "access_token": ["a", {"b": 1}]},
        {"next_page_token": "CAESBggDEgIIAQ1234567890", "nextPageToken": "CAESBggDEgIIAQ1234567890"},
        {"credential": "Doctor of Medicine", "authorization": "pre-approved"},
        {"password": "This field is required.", "secret": "Ensure this value has at least 8 characters."},
    ],
)
def test_fields_with_harmless_values_were_redacted(body: Any) -> None:
    """A name alone does not make a secret of numbers, lists, and words if the name has other meanings too."""
    assert json.loads(answered(body).body) == body


def test_fields_on_request() -> None:
    """`redact` takes a field with any value, and a pattern; `keep` exempts names that are secret by default."""
    policy = redaction_by(["SSN", PATTERN], keep=["password", re.compile("sk-demo-[0-9a-f]+")])
    body = {"ssn": 123456789, "text": "case-123456 case-12", "password": "x", "demo": "sk-demo-0123456789abcdef01"}
    gone = {"ssn": 0, "text": "REDACTED case-12", "password": "x", "demo": "sk-demo-0123456789abcdef01"}
    assert json.loads(answered(body, policy=policy).body) == gone
    assert json.loads(answered({"ssn": "123-45"}, policy=policy).body) == {"ssn": "REDACTED"}
    kept = redaction_by(keep=["api_key", re.compile(".*")])
    leaked = answered({"api_key": "x9Kp21-7fQz"}, secrets=("x9Kp21-7fQz",), policy=kept)
    assert json.loads(leaked.body) == {"api_key": "REDACTED"}
    for option, wrong in (("redact", "ssn"), ("keep", [1]), ("keep_headers", [PATTERN])):
        with pytest.raises(ConfigError, match=f"Expected {option} as a list"):
            redaction_by(**{option: wrong})  # type: ignore[arg-type]


def test_an_answer_was_changed_silently(tmp_path: Path) -> None:
    """One line of log reports changed answers, when they are recorded and when a foreign file is read."""
    tape = Tape(sink=[], name="demo")
    for text in ("sk-proj-abcdefghijklmnopqrstuvwx0123", "hello", "Bearer abcdefghijklmnopqrstuvwxyz"):
        request = HTTPRequest(url=URL, body=json.dumps(text).encode(), headers=JSON)
        tape.record(tape.issue(request), HTTPReply(status=200, body=json.dumps({"a": text}).encode(), headers=JSON))
    with pytest.warns(CassetteWarning, match="demo: 2 recorded answers were changed by the redaction of secrets"):
        tape.close()
    assert len(tape.report) == 1
    path = tmp_path / "foreign.yaml"
    path.write_text(
        "version: 1\ninteractions:\n- request: {method: GET, uri: 'https://a.example', body: null, headers: {}}\n"
        '  response: {status: {code: 200, message: OK}, headers: {}, body: {string: \'{"client_secret": "x"}\'}}\n'
    )
    with pytest.warns(
        CassetteWarning, match="1 answers are changed by the redaction of secrets, as at .*foreign.yaml:3"
    ):
        open_tape(path, "none").close(warn=False)


def test_requests_that_differ_in_a_secret_were_mixed_up() -> None:
    """They have the same key, and the redacted value orders them; authentication does not."""

    def ask(password: str, key: str = "x9Kp21-7fQz-0001") -> HTTPRequest:
        headers = {**JSON, "authorization": f"Bearer {key}"}
        body = json.dumps({"password": password, "key_of_header": key}).encode()
        return HTTPRequest(url=f"{URL}?key={key}", body=body, headers=headers)

    lines: list[bytes] = []
    tape = Tape(sink=lines)
    for password in ("one", "two", "three"):
        tape.record(tape.issue(ask(password)), HTTPReply(status=200, body=password.encode(), headers=JSON))
    assert [len(decode_line(line).facts.redacted) for line in lines] == [4, 4, 4]
    replay = Tape(tuple(index_lines(lines)))
    played = [replay.play(replay.issue(ask(word, "other-K3y-92817"))) for word in ("three", "one", "unknown")]
    assert [reply and reply.body for reply in played] == [b"three", b"one", b"two"]


def test_headers_that_a_client_reads_were_dropped() -> None:
    """Pages, uploads, digest authentication, etags, commits and token counts are kept; cookies and others are not."""
    kept = {
        "link": '<https://a.example/?page=2>; rel="next"',
        "www-authenticate": 'Digest realm="x", nonce="n", algorithm=MD5, qop="auth"',
        "x-goog-upload-url": "https://a.example/upload?upload_id=1",
        "x-goog-upload-status": "active",
        "etag": '"abc"',
        "last-modified": "Wed, 21 Oct 2015 07:28:00 GMT",
        "x-repo-commit": "f" * 40,
        "content-disposition": 'attachment; filename="a.jsonl"',
        "content-range": "bytes 0-1/2",
        "x-amzn-bedrock-input-token-count": "7",
        "mcp-session-id": "0b7c",
    }
    dropped = {"set-cookie": "sid=1", "x-served-by": "cache-7", "x-trace-id": "5"}
    assert answered({}, headers={**kept, **dropped}).headers == kept
    policy = redaction_by(keep_headers=["X-Trace-*"])
    assert answered({}, headers=dropped, policy=policy).headers == {"x-trace-id": "5"}
    assert answered(b"", method="HEAD", headers={"content-length": "42"}).headers == {"content-length": "42"}


def test_a_pattern_that_keeps_every_header_kept_session_cookies_and_tokens() -> None:
    """A secret header is kept by its exact name only; a pattern keeps the header without its value."""
    headers = {
        "set-cookie": "sid=9f8e7d6c5b4a39281706f5e4d3c2b1a0; HttpOnly\ntheme=dark; Path=/",
        "x-auth-token": "9a8b7c6d5e4f30211203f4e5d6c7b8a9",
        "x-region": "eu",
    }
    assert answered({}, headers=headers, policy=redaction_by(keep_headers=["*"])).headers == {
        "set-cookie": "sid=REDACTED; HttpOnly\ntheme=dark; Path=/",
        "x-auth-token": "REDACTED",
        "x-region": "eu",
    }
    named = redaction_by(keep_headers=["x-auth-*", "x-auth-token"])
    assert answered({}, headers=headers, policy=named).headers == {"x-auth-token": headers["x-auth-token"]}


MULTIPART = (
    '--b0un\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
    '--b0un\r\nContent-Disposition: form-data; name="api_key"; filename="api_key.txt"\r\n'
    "Content-Type: text/plain\r\n\r\nhello\r\n--b0un--\r\n"
)


@pytest.mark.parametrize("name", ["api_key", "user[password]", "token", "access-token"])
def test_fields_of_a_multipart_body_leaked(name: str) -> None:
    """Every part with a field name is a form field; a file is not, whatever its name."""
    headers = {"content-type": 'multipart/form-data; boundary="b0un"'}
    body = MULTIPART.format(name=name, value="Plain1Secret11111111").encode()
    clean = redact_request(HTTPRequest(url=URL, body=body, headers=headers)).body
    assert clean == MULTIPART.format(name=name, value="REDACTED").encode()
    other = MULTIPART.format(name="model", value="whisper-1").encode()
    assert redact_request(HTTPRequest(url=URL, body=other, headers=headers)).body == other


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://mcp.example/?api_key=Plain2Secret&n=1", "https://mcp.example/?api_key=REDACTED&n=1"),
        ("https://user:Plain3Secret33333333@host.example/x.png", "https://REDACTED@host.example/x.png"),
        ("https://blob.example/x.png?sv=1&sig=Plain4Secret%2F444", "https://blob.example/x.png?sv=1&sig=REDACTED"),
        ("/v1/files?access_token=Plain5Secret#top", "/v1/files?access_token=REDACTED#top"),
        ("[link](https://a.example/?client_secret=Plain6Secret)", "[link](https://a.example/?client_secret=REDACTED)"),
        ("https://a.example/?X-Amz-Signature=0123456789abcdef", "https://a.example/?X-Amz-Signature=REDACTED"),
    ],
)
def test_addresses_in_a_body_leaked(text: str, clean: str) -> None:
    """Parameters with a secret name, and passwords, are redacted, also if JSON or PHP escapes the address."""
    assert json.loads(answered({"url": text}).body) == {"url": clean}
    php = json.dumps({"url": text}).replace("/", r"\/").encode()
    assert json.loads(answered(php).body) == {"url": clean}


@pytest.mark.parametrize(
    "text",
    [
        "https://shop.example/search?key=cats&token=next&auth=none",
        "https://a.example/list?pageToken=CAESBggDEgIIAQ1234567890",
        "mail me@host.example or https://a.example/@user?x=1",
        "https://user:password@host.example",
        "if key=value then sig=kill",
    ],
)
def test_addresses_without_secrets_are_unchanged(text: str) -> None:
    """Under common names such as `key`, and as a user, only a value that looks like a secret is redacted."""
    assert json.loads(answered({"url": text}).body) == {"url": text}


def test_a_policy_belongs_to_the_tape() -> None:
    """A tape keeps what its own rules allow; another tape of the process does not."""
    for rules, expected in ((TapeRules(redaction=redaction_by(["city"])), "REDACTED"), (TapeRules(), "Paris")):
        lines: list[bytes] = []
        tape = Tape(sink=lines, rules=rules)
        request = HTTPRequest(url=f"{URL}?city=Paris", body=b'{"city": "Paris"}', headers=JSON)
        tape.record(tape.issue(request), HTTPReply(status=200, body=b"{}", headers=JSON))
        written = decode_line(lines[0]).request
        assert (written.url, json.loads(written.body)) == (f"{URL}?city={expected}", {"city": expected})
        replay = Tape(tuple(index_lines(lines)), rules=rules)
        assert replay.play(replay.issue(request)) is not None


def test_a_secret_at_the_start_of_an_escape() -> None:
    r"""A key may begin with the digits of `\u0041`; removing them would break the JSON."""
    body = rb'{"m": "\u0041BCDEFGHIJKLMNOP1"}'
    clean = redact_body(body, needles_of(frozenset({"41BCDEFGHIJKLMNOP1"})))[0]
    assert json.loads(clean)


def test_chunks_of_text_and_of_arguments_were_joined() -> None:
    """Events of two types are two texts, although their chunks have the same index: the Responses API's deltas."""

    def stream(*events: tuple[str, str]) -> bytes:
        return "".join(f"data: {json.dumps({'type': kind, 'delta': text})}\n\n" for kind, text in events).encode()

    text, arguments = "response.output_text.delta", "response.function_call_arguments.delta"
    body = stream((arguments, '{"pass'), (arguments, 'phrase": "mel'), (text, "Speak, "), (arguments, 'lon"}'))
    assert redact_body(body, ())[0] == body
    secret = stream((text, "sk-proj-abcdefgh"), (arguments, "{}"), (text, "ijklmnopqrstuvwx0123 is it"))
    assert b"ijklmnop" not in redact_body(secret, ())[0]


def test_recordings_pass_the_check() -> None:
    """`check` and the writer share one definition, also for kept headers that end like a secret's name."""
    headers = {"x-ratelimit-key": "a1b2c3d4e5f6", "x-goog-upload-token": "a1b2c3d4e5f6", "www-authenticate": "Bearer"}
    reply = answered({"api_key": "x9Kp21-7fQz", "next": "/v1?key=x9Kp21-7fQz"}, headers=headers)
    exchange = Exchange(request=HTTPRequest(url=URL, body=b"{}", headers={}), reply=reply, facts=Facts(lineage=""))
    assert secrets_in(exchange) == []
