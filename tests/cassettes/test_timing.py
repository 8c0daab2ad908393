"""Replay with latency and faults, as pure functions of the tape and a seed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import aggregator
from aggregator.cassettes.exchanges import Exchange, Facts, Row, encode_line, index_lines
from aggregator.cassettes.lineage import current_tape
from aggregator.cassettes.rules import KINDS, FaultKind, Faults, Latency, TapeRules
from aggregator.cassettes.tape import Tape
from aggregator.errors import APIConnectionError, APITimeoutError, ConfigError
from aggregator.records import HTTPReply, HTTPRequest

STREAM = HTTPReply(
    status=200, body=b"data: a\n\ndata: b\n\n", headers={}, milliseconds=1500.0, chunks=((9, 500.0), (9, 1500.0))
)


def request(index: int = 0) -> HTTPRequest:
    return HTTPRequest(url="https://api.example.com/v1", body=b'{"q": %d}' % index, headers={})


def rows(count: int = 1) -> tuple[Row, ...]:
    exchanges = (
        Exchange(request=request(i), reply=STREAM, facts=Facts(lineage="", ms=1500.0, chunks=STREAM.chunks))
        for i in range(count)
    )
    return tuple(index_lines(encode_line(one) for one in exchanges))


@pytest.mark.parametrize(("latency", "seconds"), [("off", 0.0), ("recorded", 1.5), (0.01, 0.015), (2, 3.0)])
def test_latency(latency: Latency, seconds: float) -> None:
    """A replayed answer takes no time, its recorded time, or that scaled; the caller's clock waits."""
    tape = Tape(rows(), rules=TapeRules(latency=latency))
    reply = tape.play(tape.issue(request()))
    assert reply is not None
    assert tape.delay(reply) == pytest.approx(seconds)


@pytest.mark.parametrize("latency", ["slow", -1, float("nan"), float("inf")])
def test_an_invalid_latency(latency: Latency) -> None:
    """It must be a number or a known word."""
    with pytest.raises(ConfigError, match='Expected latency "off", "recorded" or a number >= 0'):
        Tape(rules=TapeRules(latency=latency))


def test_chunk_boundaries_are_kept(tmp_path: Path) -> None:
    """A streamed reply has the recorded boundaries and times of its chunks."""
    for mode in ("all", "none"):
        with aggregator.cassette(tmp_path / "a.yaml", mode):
            tape = current_tape()
            assert tape is not None
            slot = tape.issue(request())
            reply = tape.play(slot)
            if reply is None:
                tape.record(slot, STREAM)
            else:
                assert (reply.chunks, reply.body, reply.milliseconds) == (STREAM.chunks, STREAM.body, 1500.0)


def certain(kind: FaultKind) -> Faults:
    return msgspec.convert({kind: 1.0, "retry_after": 7.0}, Faults)


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_comes_before_the_recorded_answer(kind: FaultKind) -> None:
    """A fault hits the first attempt and uses up nothing: the next attempt gets the recorded answer."""
    tape = Tape(rows(), rules=TapeRules(faults=certain(kind)))
    slot = tape.issue(request())
    if kind in ("timeout", "cut"):
        with pytest.raises(APITimeoutError if kind == "timeout" else APIConnectionError, match="injected fault"):
            tape.play(slot)
    else:
        fault = tape.play(slot)
        assert fault is not None
        assert fault.status == {"rate_limit": 429, "server_error": 500, "malformed": 200}[kind]
        assert fault.headers.get("retry-after") == ("7" if kind == "rate_limit" else None)
        assert fault.replayed
    reply = tape.play(slot)
    assert reply is not None
    assert reply.body == STREAM.body
    tape.close()


def kinds(seed: int, order: range) -> dict[int, FaultKind | None]:
    faults = Faults(rate_limit=0.1, server_error=0.1, timeout=0.1, cut=0.1, malformed=0.1, seed=seed)
    return {index: faults.choose(b"key%d" % index, "train", 0, 0) for index in order}


def test_faults_are_seeded() -> None:
    """The same seed hits the same calls, in any order; another seed hits others."""
    assert kinds(1, range(200)) == kinds(1, range(199, -1, -1))
    assert kinds(1, range(200)) != kinds(2, range(200))


def test_fault_rates_are_respected() -> None:
    """Over many calls each fault occurs about as often as requested."""
    drawn = list(kinds(3, range(5000)).values())
    assert all(400 < drawn.count(kind) < 600 for kind in KINDS)


@pytest.mark.parametrize("rates", [{"cut": 1.5}, {"cut": -0.1}, {"cut": 0.6, "timeout": 0.6}])
def test_invalid_fault_rates(rates: dict[str, float]) -> None:
    """A rate must be a probability."""
    with pytest.raises(ConfigError, match="Expected fault rates in"):
        Faults(**rates)  # type: ignore[arg-type]
