"""Which tests played what of which cassette; `aggregator cassette` reads it. Imports nothing but pytest.

    {"tests/test_router.py::test_plain": {"path": "...yaml", "unplayed": ["- #0.0 9f86d081884c"], "complete": true}}

An account is complete if its test passed: only then are unplayed exchanges ones that the test no longer needs. A run
of some tests keeps the accounts of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aggregator.testing.marks import cassette_path, mark_arguments

Account = dict[str, Any]
Accounts = dict[str, Account]
SHOWN = 3


def unfinished(path: object) -> Account:
    """Return the account of a test that did not finish, or that is unknown."""
    return {"path": str(path), "unplayed": [], "complete": False}


@dataclass
class Ledger:
    """What was collected in this session, and what its tests played."""

    files: set[str] = field(default_factory=set)  # those that tests were collected from
    marked: dict[str, str] = field(default_factory=dict)  # test -> its cassette; those left out by `-k` too
    shared: dict[str, str] = field(default_factory=dict)  # test -> another one of the same default cassette
    played: Accounts = field(default_factory=dict)
    recorders: dict[Path, set[str]] = field(default_factory=dict)  # cassette -> tests that opened it to record

    def collect(self, items: Iterable[pytest.Item]) -> None:
        """Record the collected tests. An invalid mark raises when its test runs."""
        unnamed: dict[str, str] = {}
        for item in items:
            self.files.add(_file_of(item.nodeid))
            try:
                arguments = mark_arguments(item)
            except pytest.UsageError:
                continue
            if arguments is None:
                if item.get_closest_marker("vcr") is not None:
                    self.marked[item.nodeid] = str(cassette_path(item, None))
                continue
            path = self.marked[item.nodeid] = str(cassette_path(item, arguments["name"]))
            if arguments["name"] is None and (other := unnamed.setdefault(path, item.nodeid)) != item.nodeid:
                self.shared.setdefault(other, item.nodeid)
                self.shared[item.nodeid] = other

    def mode(self, test: str, path: Path, mode: str) -> str:
        """Return the mode of a test's cassette: it adds to what another test of this session has recorded."""
        others = self.recorders.get(path, set()) - {test}
        return "new_episodes" if others and mode in ("once", "all") else mode

    def merge_with(self, kept: Accounts, root: Path, *, partial: bool) -> Accounts:
        """Return the accounts of all existing tests; `kept` are those of earlier runs.

        After a `partial` collection, such as one test by its id, tests that were not collected count as existing.
        """

        def exists(test: str) -> bool:
            file = _file_of(test)
            return test in self.marked or ((partial or file not in self.files) and (root / file).exists())

        still = {test: account for test, account in kept.items() if exists(test)}
        unknown = {test: unfinished(path) for test, path in self.marked.items() if test not in still}
        return still | unknown | self.played

    def to_plain(self) -> dict[str, Any]:
        """Return the ledger as plain data, for an xdist worker to send."""
        return {"files": sorted(self.files), "marked": self.marked, "played": self.played}

    def add(self, plain: Mapping[str, Any]) -> None:
        """Add the ledger that an xdist worker sent."""
        self.files |= set(plain["files"])
        self.marked |= plain["marked"]
        self.played |= plain["played"]


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def summary(accounts: Accounts, played: Accounts) -> Iterator[str]:
    """Yield what tests of this run left unplayed, each cassette once, and the tests that asked nothing."""
    sharing: dict[str, Accounts] = {account["path"]: {} for _, account in sorted(played.items())}
    for test, account in accounts.items():
        sharing.get(account["path"], {})[test] = account
    reported = set()
    for path, tests in sharing.items():
        if left := _left_over(tests):
            reported |= set(tests)
            who = next(iter(tests)) if len(tests) == 1 else f"{len(tests)} tests of {path}"
            yield f"{who} left {_count(left, 'recorded exchange')} unplayed: {', '.join(left[:SHOWN])}"
    idle = sorted(test for test, account in played.items() if account.get("idle") and test not in reported)
    if idle:
        more = f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else ""
        yield (
            f"{_count(idle, 'passed test')} with a cassette asked nothing that it records or plays: "
            f"{', '.join(idle[:SHOWN])}{more}; name their client (clients=...), or remove the mark"
        )


def _left_over(tests: Accounts) -> list[str]:
    """Return what none of a cassette's tests played; nothing if one of them has not passed."""
    if not all(account.get("complete") and account.get("rule") == "report" for account in tests.values()):
        return []
    first, *others = (account["unplayed"] for account in tests.values())
    every = set(first).intersection(*others)
    return [exchange for exchange in first if exchange in every]


def _count(things: list[str], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
