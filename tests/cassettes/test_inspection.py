"""What a recorded cassette holds, as facts."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from aggregator.cassettes.exchanges import Exchange, Facts, Row, index_lines
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.tape import Tape
from aggregator.cli._exchanges import (
    Totals,
    find_cassettes,
    model_of,
    needles_from,
    render,
    secrets_in,
    tally,
    too_old,
    totals_of,
    usage_of,
)
from aggregator.errors import ConfigError
from aggregator.records import HTTPReply, HTTPRequest

URL = "http://127.0.0.1/v1/chat/completions"
NOW = datetime(2026, 3, 31, tzinfo=UTC)
CANARY = "canary-4711-canary-0815"


def exchange(asked: Any = None, answered: Any = None, url: str = URL, **facts: Any) -> Exchange:
    return Exchange(
        request=HTTPRequest(url=url, body=json.dumps(asked or {"model": "m"}).encode(), headers={}),
        reply=HTTPReply(status=200, reason="OK", body=json.dumps(answered or {}).encode(), headers={}),
        facts=Facts(lineage="", **facts),
    )


def recorded(*answers: tuple[str, str]) -> tuple[Row, ...]:
    """Record one exchange for each (lineage, answer)."""
    lines: list[bytes] = []
    tape = Tape(sink=lines)
    for place, answer in answers:
        with lineage(place):
            slot = tape.issue(HTTPRequest(url=URL, body=b'{"model":"m"}', headers={}))
            reply = HTTPReply(status=200, body=json.dumps({"text": answer}).encode(), headers={})
            tape.record(slot, reply)
    return tuple(index_lines(lines))


@pytest.mark.parametrize(
    ("given", "model"),
    [
        (exchange({"model": "asked"}), "asked"),
        (exchange({"model": "asked"}, model="noted"), "noted"),
        (exchange([1], url="http://127.0.0.1/v1beta/models/gemini-2:generateContent"), "gemini-2"),
        (exchange([1]), ""),
    ],
)
def test_the_model_is_recorded_or_read_from_the_request(given: Exchange, model: str) -> None:
    """Our own fact has precedence; in another tool's cassette it is in the request's body or path."""
    assert model_of(given) == model


@pytest.mark.parametrize(
    ("answered", "expected"),
    [
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 2}}, {"input_tokens": 7, "output_tokens": 2}),
        ({"usage": {"input_tokens": 7, "output_tokens": 2}}, {"input_tokens": 7, "output_tokens": 2}),
        ({"usageMetadata": {"promptTokenCount": 7}}, {"input_tokens": 7}),
        ({"usage": "none"}, {}),
        ([], {}),
    ],
)
def test_tokens_are_read_from_any_providers_answer(answered: Any, expected: dict[str, float]) -> None:
    """Another tool's cassette has tokens too, in its provider's format; an unknown number is not 0."""
    assert usage_of(exchange(answered=answered)) == expected


def test_totals_are_by_role_and_model() -> None:
    """Sums add known values and count the unknown ones."""
    known = exchange(role="optimizer", model="m", ms=1500.0, usage={"input_tokens": 5, "output_tokens": 1, "cost": 0.5})
    failed = exchange(role="optimizer", model="m")
    failed = replace(failed, reply=replace(failed.reply, status=429))
    assert tally([known, exchange(model="n"), failed]) == {
        ("agent", "n"): Totals(exchanges=1, unknown=1),
        ("optimizer", "m"): Totals(
            exchanges=2, failed=1, input_tokens=5, output_tokens=1, cost=0.5, seconds=1.5, unknown=1
        ),
    }


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (exchange({"api_key": CANARY}), "the request's body"),
        (exchange(answered={"api_key": CANARY}), "the answer's body"),
        (exchange(answered={"echo": f"your key is {CANARY}"}), "the answer's body"),
        (exchange(url=f"{URL}?api_key={CANARY}"), "the request's address"),
    ],
)
def test_secrets_are_reported_if_redaction_would_change_something(given: Exchange, place: str) -> None:
    """A hand-edited or foreign cassette is checked by the same rules as our own recordings."""
    assert secrets_in(given, needles_from({"MY_API_KEY": CANARY})) == [place]


@pytest.mark.parametrize(
    "item",
    [
        {"headers": {"authorization": "<filtered>", "x-api-key": "REDACTED", "cookie": "a=REDACTED; b=REDACTED"}},
        {"headers": {"authorization": "Bearer <AUTH_TOKEN>", "api-key": "**REDACTED**", "x-goog-api-key": "[MASKED]"}},
        {"headers": {"authorization": "AUTHORIZATION-XXX", "x-auth-token": "${TOKEN}", "set-cookie": "SET-COOKIE-XXX"}},
        {"headers": {"access-control-allow-credentials": "true", "x-token": "0", "authorization": "xxxxxxxx"}},
        {"url": f"{URL}?key=<API_KEY>&sig=REDACTED&pageToken=CAESBggDEgIIAQ1234567890"},
        {"url": "https://REDACTED@api.example.com/v1"},
        {
            "body": {
                "api_key": "<filtered>",
                "password": "***",
                "client_secret": "{{secret}}",
                "access_token": "xxx-xxx",
            }
        },
    ],
)
def test_placeholders_of_other_scrubbers_were_reported_as_secrets(item: Any) -> None:
    """They are recognised in headers, cookies, addresses and bodies."""
    given = exchange(item.get("body"), answered=item.get("body"), url=item.get("url", URL))
    headers = item.get("headers", {})
    given = replace(given, request=replace(given.request, headers=headers), reply=replace(given.reply, headers=headers))
    assert secrets_in(given) == []


@pytest.mark.parametrize(
    "header",
    ["authorization", "Set-Cookie", "x-api-key", "x-functions-key", "Helicone-Auth", "x-signature", "x-csrf-token"],
)
def test_secrets_are_found_in_headers(header: str) -> None:
    """An authentication header is a secret whatever its value, unless it was redacted."""
    given = exchange()
    open_ = replace(given, request=replace(given.request, headers={header: "anything"}))
    redacted = replace(given, request=replace(given.request, headers={header: "REDACTED"}))
    headers = {
        "server": "nginx",
        "access-control-allow-credentials": "true",
        "idempotency-key": "retry-1",
        "x-ratelimit-limit-tokens": "5",
    }
    harmless = replace(given, reply=replace(given.reply, headers=headers))
    assert secrets_in(open_) == [f"the request's header {header}"]
    assert secrets_in(redacted) == secrets_in(harmless) == secrets_in(given) == []


def test_our_recordings_hold_no_secret() -> None:
    """Our own recordings pass our own check."""
    lines: list[bytes] = []
    tape = Tape(sink=lines)
    request = HTTPRequest(
        url=f"{URL}?key={CANARY}", body=b'{"api_key":"%b"}' % CANARY.encode(), headers={"authorization": CANARY}
    )
    tape.record(tape.issue(request), HTTPReply(status=200, body=CANARY.encode(), headers={"set-cookie": CANARY}))
    assert CANARY.encode() not in lines[0]
    assert secrets_in(next(index_lines(lines)).exchange(), needles_from({"MY_API_KEY": CANARY})) == []


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ("2026-03-01T00:00:00Z", "recorded 30 days ago"),
        ("2026-03-30T00:00:00Z", None),
        ("", "recorded at an unknown time"),
    ],
)
def test_age(at: str, told: str | None) -> None:
    """An exchange beyond the limit is too old; one of unknown age is not fresh."""
    assert too_old(exchange(at=at), NOW, timedelta(days=7)) == told


@pytest.mark.parametrize(
    ("at", "told"),
    [("yesterday", "recorded at an unknown time"), ("2026-03-01T00:00:00", "recorded 30 days ago")],
)
def test_an_invalid_date_raised_a_bare_exception(at: str, told: str) -> None:
    """A date without a zone is in UTC; any other text is no date."""
    assert too_old(exchange(at=at), NOW, timedelta(days=7)) == told


def test_a_short_variable_was_found_in_every_cassette() -> None:
    """`OPENAI_API_KEY=chat` is a placeholder, and a common word."""
    given = exchange(answered={"text": "let us chat"})
    assert secrets_in(given, needles_from({"OPENAI_API_KEY": "chat"})) == []


def test_other_files_were_read_as_cassettes(tmp_path: Path) -> None:
    """In a folder only a file that begins like a cassette counts, damaged or not; a file given by name always does."""
    cassettes = {
        "closed.yaml": "# aggregator-cassette format=1 layout=journal",
        "vcrpy.yaml": "interactions:\n- request:",
        "vcrpy.json": '{"version": 1, "interactions": [{',
        "ruby.yml": "---\nhttp_interactions:\n- request",
        "headless.yaml": '- {"request":{"method":',
        "cut.yaml": "",
        "a.4be0c1d2a7f3.0002.yaml": "# aggregator-cassette format=1 layout=journal state=closed shard=2/2",
    }
    others = {"tickets.json": '[{"text": "interactions: none"}]', "ci.yaml": "jobs:\n  a: [", "b.yaml": "\x00"}
    for name, text in {**cassettes, **others}.items():
        (tmp_path / name).write_text(text)
    assert find_cassettes([tmp_path]) == sorted(tmp_path / name for name in cassettes)
    assert find_cassettes([tmp_path / "ci.yaml"]) == [tmp_path / "ci.yaml"]


@pytest.mark.parametrize("tokens", [10**400, -5, True, 1e300, "7"])
def test_an_invalid_number_raised_a_bare_exception(tokens: Any) -> None:
    """Tokens that cannot be summed or printed are unknown."""
    assert usage_of(exchange(answered={"usage": {"prompt_tokens": tokens, "completion_tokens": 2}})) in (
        {"output_tokens": 2},
        {},  # JSON with a number of 400 digits is not read at all
    )


def test_folders_include_their_cassettes(tmp_path: Path) -> None:
    """Further shards belong to their first file; a path that does not exist is an error."""
    names = ["b.yaml", "a/c.json", "b.4be0c1d2a7f3.0002.yaml", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_cassettes([tmp_path, tmp_path / "b.yaml"]) == [tmp_path / "a/c.json", tmp_path / "b.yaml"]
    with pytest.raises(ConfigError, match="which does not exist"):
        find_cassettes([tmp_path / "none"])


def test_an_exchange_in_full_shows_request_and_answer() -> None:
    """Facts come first, then request and answer with their JSON indented."""
    text = render(exchange({"model": "m"}, {"text": "ä"}, ms=12.4, at="2026-03-30T00:00:00Z"))
    assert "recorded  2026-03-30T00:00:00Z, 12 ms" in text
    assert text.index(f"POST {URL}") < text.index('"model": "m"') < text.index("200 OK") < text.index('"text": "ä"')


def test_a_truncated_stream_shows_its_chunks_and_its_error() -> None:
    """It counts as failed, whatever its status is."""
    cut = exchange({"model": "m"}, {"text": "half"}, error=("APITimeoutError", "late"))
    assert render(cut).endswith('\n200 OK\n\n{\n  "text": "half"\n}\nAPITimeoutError: late')
    assert totals_of(cut).failed == 1
