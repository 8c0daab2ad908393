"""How two cassettes differ."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.cassettes.exchanges import Exchange, Facts, Row, encode_line, exchange_id, index_lines
from aggregator.cli._exchanges import describe_changes, difference
from aggregator.records import HTTPReply, HTTPRequest

JSON = {"content-type": "application/json"}


def row(place: str = "a", body: bytes = b"{}", *, status: int = 200, headers: Any = JSON, error: Any = None) -> Row:
    exchange = Exchange(
        request=HTTPRequest(url="http://127.0.0.1/v1", body=b"{}", headers={}),
        reply=HTTPReply(status=status, body=body, headers=headers),
        facts=Facts(lineage=place, error=error),
    )
    return next(index_lines([encode_line(exchange)]))


def test_a_difference_lists_removed_added_and_changed_exchanges() -> None:
    """Exchanges are compared by request and lineage, answers by JSON path."""
    before = [row("a"), row("b"), row("c", b'{"text": "3"}')]
    after = [row("a"), row("c", b'{"text": "4"}'), row("d")]
    found = difference(before, after)
    assert found.removed == (exchange_id(before[1]),)
    assert found.added == (exchange_id(after[2]),)
    assert found.changed == {exchange_id(before[2]): ("$.text: '3' -> '4'",)}
    assert not difference(before, before)


def test_json_changes_distinguish_types() -> None:
    """1, 1.0 and true differ, and so do lists of different lengths."""
    assert list(describe_changes([1, True, [1]], [1.0, 1, [1, 2]])) == [
        "$[0]: 1 -> 1.0",
        "$[1]: True -> 1",
        "$[2][1]: nothing -> 2",
    ]


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (row(error=("APITimeoutError", "late")), row(), "error: 'APITimeoutError: late' -> nothing"),
        (row(headers={"retry-after": "1"}), row(headers={"retry-after": "9"}), "retry-after: '1' -> '9'"),
        (row(), row(headers={}), "content-type: 'application/json' -> nothing"),
        (row(), row(status=503), "status: 200 -> 503"),
        (row(body=b'{"a":1.0}'), row(body=b'{"a":1}'), "$.a: 1.0 -> 1"),
        (row(body=b'{"a":true}'), row(body=b'{"a":1}'), "$.a: True -> 1"),
        (row(body=b"\xff"), row(body=b"\xfe"), "$: b'\\xff' -> b'\\xfe'"),
        (row(body=b'{"a":1}'), row(body=b'{"a": 1}'), "body: the same JSON, written otherwise"),
    ],
)
def test_answers_that_differ_were_reported_as_equal(before: Row, after: Row, change: str) -> None:
    """An error, a header that a client obeys, the type of a number, and binary bytes are compared."""
    assert list(difference([before], [after]).changed.values()) == [(change,)]


def test_dates_and_ids_are_not_compared() -> None:
    """They differ in every recording of the same answer."""
    before, after = ({**JSON, "date": day, "x-request-id": day, "x-ratelimit-remaining-tokens": day} for day in "12")
    assert not difference([row(headers=before)], [row(headers=after)])
