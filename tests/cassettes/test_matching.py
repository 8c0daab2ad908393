"""Which requests match: equivalent addresses, named parts, key functions, matchers, hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import aggregator
from aggregator.cassettes.exchanges import decode_line, index_lines
from aggregator.cassettes.lineage import lineage
from aggregator.cassettes.matching import canonical_url, matching_by, request_key
from aggregator.cassettes.recorder import open_tape
from aggregator.cassettes.rules import TapeRules
from aggregator.cassettes.tape import Tape
from aggregator.errors import CassetteMissError, ConfigError
from aggregator.records import HTTPReply, HTTPRequest

URL = "https://api.example.com/v1"


def ask(body: str = "{}", url: str = URL, method: str = "POST") -> HTTPRequest:
    return HTTPRequest(url=url, body=body.encode(), headers={"content-type": "application/json"}, method=method)


def recorded(*requests: HTTPRequest, rules: TapeRules | None = None) -> list[bytes]:
    """Return the lines of requests that are answered by their number."""
    lines: list[bytes] = []
    tape = Tape(sink=lines, rules=rules or TapeRules())
    for number, request in enumerate(requests):
        tape.record(tape.issue(request), HTTPReply(status=200, body=b"%d" % number, headers={}))
    tape.close()
    return lines


def played(lines: list[bytes], *requests: HTTPRequest, **rules: Any) -> tuple[list[str], Tape]:
    """Return what each request plays, "miss" if nothing matches, and the closed tape."""
    tape = Tape(tuple(index_lines(lines)), name="demo", rules=TapeRules(**rules, expects_all=False))
    found = []
    for request in requests:
        try:
            reply = tape.play(tape.issue(request))
            found.append("live" if reply is None else reply.body.decode())
        except CassetteMissError:
            found.append("miss")
    tape.misses.clear()
    tape.close()
    return found, tape


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://h.example/v1?b=2&a=1", "https://h.example/v1?a=1&b=2"),
        ("https://h.example:443/v1", "https://h.example/v1"),
        ("https://h.example:0443/v1", "https://h.example/v1"),
        ("http://h.example:/v1", "http://h.example/v1"),
        ("https://h.example/a/./b/../v1", "https://h.example/a/v1"),
        ("https://h.example/a/%2e%2E/", "https://h.example"),
        ("https://h.example/a/..", "https://h.example/"),
        ("https://m\u00fcller.example/", "https://xn--mller-kva.example/"),
        ("http://h.example:80/v1", "http://h.example/v1"),
        ("https://H.Example/v1", "HTTPS://h.example/v1"),
        ("https://h.example", "https://h.example/"),
        ("https://h.example?a=1", "https://h.example/?a=1"),
        ("https://h.example/v1#top", "https://h.example/v1"),
        ("https://h.example/?q=a+b", "https://h.example/?q=a%20b"),
        ("https://h.example/?q=%c3%a9", "https://h.example/?q=é"),
        ("https://h.example/%7Euser/a%3Ab", "https://h.example/~user/a:b"),
        ("https://h.example/?u=https://x/y", "https://h.example/?u=https%3A%2F%2Fx%2Fy"),
        ("https://h.example/?a=1&", "https://h.example/?a=1"),
        ("https://h.example/?a", "https://h.example/?a="),
        ("https://[::1]:443/v1", "https://[::1]/v1"),
    ],
)
def test_equivalent_addresses_missed(one: str, other: str) -> None:
    """Clients and proxies write one address in several ways; each recording plays for the other spellings."""
    assert request_key("GET", one, b"") == request_key("GET", other, b"")
    for before, after in ((one, other), (other, one)):
        assert played(recorded(ask(url=before)), ask(url=after))[0] == ["0"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://h.example/v1", "https://h.example/v1/"),
        ("https://h.example/V1", "https://h.example/v1"),
        ("https://h.example/?a=1&a=2", "https://h.example/?a=2&a=1"),
        ("https://h.example/a%2Fb", "https://h.example/a/b"),
        ("https://h.example/a+b", "https://h.example/a%20b"),
        ("https://h.example/?q=a%2Bb", "https://h.example/?q=a+b"),
        ("https://h.example:8443/", "https://h.example/"),
        ("http://h.example:443/", "http://h.example/"),
        ("https://h.example/?a=1%26b=2", "https://h.example/?a=1&b=2"),
    ],
)
def test_different_addresses_differ(one: str, other: str) -> None:
    """A trailing slash, the order of repeated names, an encoded slash or plus, and another port are differences."""
    assert canonical_url(one) != canonical_url(other)
    assert canonical_url(canonical_url(one)) == canonical_url(one)


def test_an_older_cassette_plays_its_own_addresses() -> None:
    """Two spellings of one address once had separate tickets; each still plays its own recording."""
    one, other = recorded(ask(url="https://h.example")), recorded(ask(url="https://h.example/"))
    rows = [*one, other[0].replace(b'"0"', b'"1"')]
    asked = (ask(url="https://h.example/"), ask(url="https://h.example"))
    assert played(rows, *asked)[0] == ["1", "0"]


def test_a_replay_need_not_compare_bodies() -> None:
    """`match_on` names the compared parts: vcrpy's default leaves the body out."""
    lines = recorded(ask('{"q": 1}'), ask('{"q": 2}'), ask(url=f"{URL}/other"))
    asked = (ask('{"q": 9}'), ask('{"q": 8, "store": false}'), ask('{"q": 7}'))
    assert played(lines, *asked)[0] == ["miss"] * 3
    found, tape = played(lines, *asked, match_on=("method", "scheme", "host", "port", "path", "query"))
    assert found == ["0", "1", "miss"]
    told = f"POST {URL} plays exchange 0; POST {URL} plays exchange 1"
    assert tape.report == [f"demo: 2 calls played an answer to another request, as match_on allows: {told}"]
    exact, tape = played(lines, ask('{"q":1}'), ask('{"q":2}'), match_on=("method", "uri"))
    assert (exact, tape.report) == (["0", "1"], [])


@pytest.mark.parametrize(
    ("names", "same", "differs"),
    [
        (("path",), ask(url="http://other/v1?x=1", method="GET"), ask(url=f"{URL}/x")),
        (("host", "query"), ask(url="http://api.example.com:8/x", method="GET"), ask(url=f"{URL}?a=1")),
        (("port", "scheme"), ask(url="https://x/y"), ask(url="http://x/y")),
        (("body",), ask('{ "a": 1, "b": 2 }', url="http://x"), ask('{"a": 1.0, "b": 2}')),
        (("raw_body",), ask('{"b":2,"a":1}', url="http://x"), ask('{"a":1,"b":2}')),
    ],
)
def test_each_part_is_compared_separately(names: tuple[str, ...], same: HTTPRequest, differs: HTTPRequest) -> None:
    """A part that is not named may differ."""
    lines = recorded(ask('{"b":2,"a":1}'))
    assert played(lines, same, match_on=names)[0] == ["0"]
    assert played(lines, differs, match_on=names)[0] == ["miss"]


def by_question(request: HTTPRequest) -> bytes:
    """Return the question alone."""
    return str(json.loads(request.body).get("q")).encode()


def test_a_key_function_defines_a_match() -> None:
    """It gets the redacted request; lineage and order of issue still count."""
    with lineage("a"):
        lines = recorded(ask('{"q": 1, "t": 5}'), ask('{"q": 2, "t": 6}'), ask('{"q": 1, "t": 7}'))
    asked = [ask(json.dumps({"q": number, "t": 99})) for number in (1, 2, 1, 1)]
    with lineage("a"):
        assert played(lines, *asked, match_on=by_question)[0] == ["0", "1", "2", "miss"]
    with lineage("b"):
        assert played(lines, asked[0], match_on=by_question)[0] == ["miss"]
    with pytest.raises(ConfigError, match="Expected the key function of match_on to return bytes, got None"):
        played(lines, asked[0], match_on=lambda request: None)


def same_length(one: Any, other: Any) -> bool:
    return len(one.body) == len(other.body)


def same_path(one: Any, other: Any) -> None:
    assert one.path == other.path
    assert (one.host, one.port, one.scheme) == ("api.example.com", 443, "https")


def test_matchers_of_vcrpy_compare_pairs() -> None:
    """They take two requests in vcrpy's shape and return a bool or assert; names in the list narrow them down."""
    lines = recorded(ask("one"), ask("three"), ask("two"), ask("four", url=f"{URL}/other"))
    assert played(lines, ask("six"), ask("sixty"), ask("ten"), ask("x"), match_on=("method", same_length))[0] == [
        *("0", "1", "2", "miss"),
    ]
    assert played(lines, ask("any", url=f"{URL}/other?x=1"), match_on=(same_path,))[0] == ["3"]


@pytest.mark.parametrize("wrong", ["method", ("headers",), ("nothing",), (5,), (lambda one: True,)])
def test_invalid_matchers_are_refused(wrong: Any) -> None:
    """A recording has only some headers, so they cannot be compared; a key function is not given in a list."""
    with pytest.raises(ConfigError, match="Expected m"):
        matching_by(wrong)


@pytest.mark.parametrize("match_on", [("method",), by_question, ("method", same_length)])
def test_a_loose_recording_replays_strictly(tmp_path: Path, match_on: Any) -> None:
    """Tickets count equal requests, however a tape matches, so that any other tape can play its recording."""
    path = tmp_path / "a.yaml"
    bodies = ['{"q": 1}', '{"q": 2}', '{"q": 1}', '{"q":1 }']
    for mode in ("once", "new_episodes"):
        tape = open_tape(path, mode, rules=TapeRules(match_on=match_on))
        for number, body in enumerate(bodies if mode == "once" else ['{"q": 777}']):
            slot = tape.issue(ask(body))
            if tape.play(slot) is None:
                tape.record(slot, HTTPReply(status=200, body=b"%d" % number, headers={}))
        tape.close(warn=False)
    strict = open_tape(path, "none", rules=TapeRules(expects_all=False))
    replies = [strict.play(strict.issue(ask(body))) for body in bodies]
    assert [reply and reply.body for reply in replies] == [b"0", b"1", b"2", b"3"]
    strict.close()


def test_an_answer_may_be_repeated() -> None:
    """With `allow_playback_repeats` a request's last answer repeats, for example if a job is polled more often."""
    lines = recorded(ask(), ask(), ask("other"))
    assert played(lines, *[ask()] * 4)[0] == ["0", "1", "miss", "miss"]
    asked = [*[ask()] * 4, ask("other"), ask("other"), ask("unknown")]
    found, tape = played(lines, *asked, allow_playback_repeats=True)
    assert found == ["0", "1", "1", "1", "2", "2", "miss"]
    assert tape.unplayed() == []


def without_time(request: Any) -> Any:
    """Drop a field that differs in every run, and skip health checks."""
    if request.path == "/health":
        return None
    request.body = json.dumps({name: item for name, item in json.loads(request.body).items() if name != "time"})
    request.headers["X-Seen"] = "yes"
    return request


def ours(request: Any) -> Any:
    """Return a request of our own type."""
    return HTTPRequest(url=request.url.replace("staging.", "api."), body=request.body, headers=dict(request.headers))


def test_a_hook_changes_recorded_and_new_requests() -> None:
    """It is applied to both, so that a recording made before the hook plays as well."""
    rules = TapeRules(before_request=without_time)
    for written in (recorded(ask('{"q": 1, "time": 5}'), rules=rules), recorded(ask('{"q": 1, "time": 5}'))):
        tape = Tape(tuple(index_lines(written)), rules=rules)
        admitted = tape.admit(ask('{"time": 6, "q": 1}'))
        assert admitted is not None
        assert tape.play(tape.issue(admitted)) is not None
        assert tape.admit(ask(url="https://api.example.com/health")) is None
    renamed = Tape(rules=TapeRules(before_request=ours)).admit(replace(ask(), url="https://staging.example.com/v1"))
    assert renamed is not None
    assert renamed.url == "https://api.example.com/v1"
    with pytest.raises(ConfigError, match="Expected before_record_request to return a request"):
        Tape(rules=TapeRules(before_request=lambda request: 5)).admit(ask())


def test_a_hook_hides_no_key_from_the_redaction() -> None:
    """A key is known from the authentication header even if the hook removes the header."""

    def bare(request: Any) -> Any:
        request.headers.pop("Authorization")
        return request

    lines: list[bytes] = []
    tape = Tape(sink=lines, rules=TapeRules(before_request=bare))
    request = replace(ask('{"q": "x9Kp21-7fQz-0001"}'), headers={"authorization": "Bearer x9Kp21-7fQz-0001"})
    admitted = tape.admit(request)
    assert admitted is not None
    tape.record(tape.issue(admitted), HTTPReply(status=200, body=b"{}", headers={}))
    assert b"Kp21" not in lines[0]


def scrubbed(response: Any) -> Any:
    """Hide a name, and do not record errors."""
    if response["status"]["code"] >= 500:
        return None
    response["body"]["string"] = response["body"]["string"].replace(b"Alice", b"somebody")
    return response


def test_a_hook_changes_the_recorded_answer() -> None:
    """The client gets the original; the tape records what the hook returned, or nothing, which frees the ticket."""
    lines: list[bytes] = []
    tape = Tape(sink=lines, rules=TapeRules(before_response=scrubbed))
    for status, body in ((500, b"oops"), (200, b"Dear Alice"), (200, b"Bye Alice")):
        tape.record(tape.issue(ask()), HTTPReply(status=status, body=body, headers={}))
    tape.close()
    assert [(decode_line(line).reply.body, decode_line(line).facts.ticket) for line in lines] == [
        (b"Dear somebody", 0),
        (b"Bye somebody", 1),
    ]
    broken = Tape(sink=lines, rules=TapeRules(before_response=lambda response: {"status": 5}))
    with pytest.raises(ConfigError, match="Expected before_record_response to return an answer"):
        broken.record(broken.issue(ask()), HTTPReply(status=200, body=b"", headers={}))


@pytest.mark.parametrize("clients", ["all", ()])
def test_the_options_of_a_cassette_reach_its_tape(tmp_path: Path, clients: str | tuple[str, ...]) -> None:
    """Each option of `cassette(...)` is a rule of the tape."""
    opened = aggregator.cassette(
        tmp_path / "a.yaml",
        "once",
        clients=clients,
        match_on=["method"],
        allow_playback_repeats=True,
        ignore_hosts=["x.example"],
        ignore_localhost=True,
        keep=["password"],
        before_record_request=without_time,
        before_record_response=scrubbed,
    )
    with opened as tape:
        rules = tape.rules
    assert (rules.match_on, rules.allow_playback_repeats, rules.redaction.kept_fields) == (
        ("method",),
        True,
        frozenset({"password"}),
    )
    assert (rules.before_request, rules.before_response) == (without_time, scrubbed)
    assert {"x.example", "127.0.0.1", "testserver"} <= set(rules.ignore_hosts)
