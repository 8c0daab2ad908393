"""The pytest plugin: `@pytest.mark.cassette` records the LLM calls of a test once, and replays them in later runs.

    @pytest.mark.cassette                                   # cassettes/<module>/<test>.yaml next to the module
    @pytest.mark.cassette("name", clients="all")            # cassettes/<module>/name.yaml; records other clients too
    @pytest.mark.cassette("shared/name", unplayed="error")  # cassettes/shared/name.yaml; the test fails on leftovers

Inactive unless a test has the mark: until then only pytest is imported. Its options and fixtures have other names than
pytest-recording's, so that both can be used together.

The accounts of what each test played are in pytest's cache:

    {"tests/test_router.py::test_plain": {"path": "...yaml", "unplayed": ["- #0.0 9f86d081884c"], "complete": true}}

An account is complete if its test passed: only then are unplayed exchanges ones that the test no longer needs. A run of
some tests keeps the accounts of the others. `aggregator cassette` reads them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aggregator.cassettes.tape import Tape
    from aggregator.errors import CassetteError
    from aggregator.testing.taping import Taping

# ---- marks, settings, and the accounts of what each test played

MODES = ("none", "once", "new_episodes", "all")
OPTIONS = (
    *("clients", "lineage", "latency", "ignore", "match_on", "allow_playback_repeats", "ignore_hosts"),
    *("ignore_localhost", "before_record_request", "before_record_response", "redact", "keep", "keep_headers", "code"),
)
"""The mark's arguments that are those of `cassette(...)`."""
ARGUMENTS = ("mode", *OPTIONS, "unplayed", "allowed_hosts")
UNPLAYED = ("ignore", "report", "error")
MAX_NAME = 120
MAX_BYTES = 200  # file systems allow 255, and `.new`, `.lock` or a shard's number is appended


def mark_arguments(item: pytest.Item) -> dict[str, Any] | None:
    """Return the arguments of a test's marks, the closest mark's first; None without a mark."""
    found: dict[str, Any] = {"name": None}
    held = list(item.iter_markers("cassette"))  # in pytest's order; those of a `pytest.param` come first
    marks = [mark for mark in getattr(getattr(item, "callspec", None), "marks", ()) if mark.name == "cassette"]
    marks += [mark for mark in held if not any(mark is one for one in marks)]
    for mark in reversed(marks):
        unknown = set(mark.kwargs) - {*ARGUMENTS, "name"}
        if unknown or len(mark.args) > 1:
            raise pytest.UsageError(
                f"Expected @pytest.mark.cassette(name, {', '.join(ARGUMENTS)}), got {mark.args} {mark.kwargs} "
                f"- at {item.nodeid}"
            )
        found.update(mark.kwargs, **({"name": mark.args[0]} if mark.args else {}))
    _check_kinds(found, item)
    return found if marks else None


def _check_kinds(arguments: dict[str, Any], item: pytest.Item) -> None:
    name = arguments["name"]
    if name is not None and not (isinstance(name, str) and name):
        raise pytest.UsageError(f"Expected a cassette's name as text, got {name!r} - at {item.nodeid}")
    for argument in ("clients", "allowed_hosts", "ignore_hosts"):
        is_none = argument == "ignore_hosts" and arguments.get(argument, ()) is None
        if not is_none and not isinstance(arguments.get(argument, ()), Iterable):
            raise pytest.UsageError(
                f"Expected {argument} as text or a list of texts, got {arguments[argument]!r} - at {item.nodeid}"
            )


def resolve_settings(config: pytest.Config, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a test: command line, then mark, then ini file. In CI only the command line can record."""
    in_ci = "none" if os.environ.get("CI") else None
    mode = config.getoption("--cassette-mode") or in_ci or arguments.get("mode") or config.getini("cassette_mode")
    unplayed = arguments.get("unplayed") or config.getini("cassette_unplayed")
    if unplayed not in UNPLAYED:
        raise pytest.UsageError(f"Expected unplayed to be one of {', '.join(UNPLAYED)}, got {unplayed!r}")
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    clients = options.get("clients", config.getini("cassette_clients"))
    options["clients"] = "all" if list(clients) == ["all"] else clients if isinstance(clients, str) else tuple(clients)
    hosts = options.get("ignore_hosts", ())
    if hosts is not None:  # otherwise nothing is ignored, not even by the ini file
        options["ignore_hosts"] = [*config.getini("cassette_ignore_hosts"), *_as_list(hosts)]
        options.setdefault("ignore_localhost", config.getini("cassette_ignore_localhost"))
    return {
        "mode": mode or "once",
        "options": {**options, "private": not config.getini("cassette_shared")},
        "unplayed": unplayed,
        "allowed_hosts": [*config.getini("cassette_allowed_hosts"), *_as_list(arguments.get("allowed_hosts", ()))],
    }


def _as_list(hosts: str | Iterable[str]) -> list[str]:
    return [hosts] if isinstance(hosts, str) else list(hosts)


def cassette_path(item: pytest.Item, name: str | None) -> Path:
    """Return a test's file. A name with a slash is shared by all modules, one without belongs to the test's module."""
    root, folder = item.config.rootpath, str(item.config.getini("cassette_dir"))
    module = item.path.with_suffix("")
    if folder:
        base = root / folder
        inside = module.relative_to(root) if module.is_relative_to(root) else Path(module.name)
    else:
        base, inside = item.path.parent / "cassettes", Path(module.name)
    if name is None:
        owner = getattr(item, "cls", None)
        name = _file_name(f"{owner.__name__}.{item.name}" if owner else item.name)
    elif "/" in name:
        inside = Path()
    return base / inside / (name if name.endswith((".yaml", ".yml", ".json", ".gz")) else f"{name}.yaml")


def _file_name(test: str) -> str:
    """Return a test's name as a file name, as pytest-recording does, so that either can use the other's cassettes.

    >>> _file_name("test_route[a/b]")
    'test_route[a-b]'
    """
    safe = re.sub(r"""[<>?%*:|"'/\\]""", "-", test)
    if len(safe) <= MAX_NAME and len(safe.encode()) <= MAX_BYTES:
        return safe
    return f"{safe.encode()[:MAX_NAME].decode(errors='ignore')}-{hashlib.sha256(test.encode()).hexdigest()[:12]}"


# Accounts

Account = dict[str, Any]
Accounts = dict[str, Account]
SHOWN = 3


def unfinished(path: object) -> Account:
    """Return the account of a test that did not finish, or that is unknown."""
    return {"path": str(path), "unplayed": [], "complete": False}


@dataclass
class Ledger:
    """The collected tests of this session, and what they played."""

    files: set[str] = field(default_factory=set)  # those that tests were collected from
    marked: dict[str, str] = field(default_factory=dict)  # test -> its cassette, including tests deselected by `-k`
    shared: dict[str, str] = field(default_factory=dict)  # test -> another one with the same default cassette
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

        After a `partial` collection, such as one test by its id, uncollected tests count as existing.
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
        """Add the ledger sent by an xdist worker."""
        self.files |= set(plain["files"])
        self.marked |= plain["marked"]
        self.played |= plain["played"]


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def summary(accounts: Accounts, played: Accounts) -> Iterator[str]:
    """Yield the exchanges that this run's tests left unplayed, each cassette once, and the tests without a call."""
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
    """Return the exchanges that none of a cassette's tests played; none if one of them has not passed."""
    if not all(account.get("complete") and account.get("rule") == "report" for account in tests.values()):
        return []
    first, *others = (account["unplayed"] for account in tests.values())
    every = set(first).intersection(*others)
    return [exchange for exchange in first if exchange in every]


def _count(things: list[str], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


PLAYED = "aggregator/cassettes"  # the cache key of the accounts; `aggregator cassette check` reads it

LEDGER: pytest.StashKey[Ledger] = pytest.StashKey()
ACCOUNTS: pytest.StashKey[Accounts] = pytest.StashKey()
COLLECTED: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()
CURRENT: pytest.StashKey[pytest.Item] = pytest.StashKey()

PASSED: pytest.StashKey[bool | None] = pytest.StashKey()
"""True after a call that passed, False after any failure; None before, and for a skipped test."""
EARLY: pytest.StashKey[ExitStack] = pytest.StashKey()
REFUSALS: pytest.StashKey[list[CassetteError]] = pytest.StashKey()
TAPING: pytest.StashKey[Taping] = pytest.StashKey()


# ---- hooks and fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our option and settings."""
    group = parser.getgroup("cassettes", "LLM exchanges recorded and replayed")
    group.addoption("--cassette-mode", choices=MODES, help="record mode of every marked test, in place of its mark's")
    parser.addini("cassette_dir", "folder of all cassettes, from the root (default: `cassettes` next to each module)")
    parser.addini("cassette_mode", f"record mode of marked tests: {', '.join(MODES)} (default: none in CI, else once)")
    parser.addini("cassette_clients", "other clients to serve: `all`, or names as `httpx requests`", type="args")
    parser.addini("cassette_unplayed", f"exchanges that a test left unplayed: {', '.join(UNPLAYED)}", default="report")
    parser.addini(
        "cassette_ignore_hosts", "hosts that cassettes leave to the network, in addition to the usual ones", type="args"
    )
    parser.addini("cassette_ignore_localhost", "leave this machine to the network", type="bool")
    parser.addini("cassette_allowed_hosts", "hosts that a replaying test may reach", type="args")
    parser.addini(
        "cassette_shared", "new cassettes have the permissions of the umask, not for their owner only", type="bool"
    )
    parser.addini(
        "cassette_serve_vcr", "play the `vcr` tests of pytest-recording with this library's tape", type="bool"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark and create the ledger."""
    config.addinivalue_line(
        "markers",
        "cassette(name=None, *, mode=None, clients=(), lineage='strict', latency='off', code=False, unplayed=None, "
        "allowed_hosts=(), and options of aggregator.cassette): record this test's LLM exchanges, and replay them",
    )
    config.stash[LEDGER] = Ledger()
    config.stash[COLLECTED] = []
    config.stash[ACCOUNTS] = {}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Record every test, including those that `-k` deselects later."""
    item.config.stash[COLLECTED].append(item)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Add the collected tests to the ledger, once they have all their marks."""
    collected = session.config.stash[COLLECTED]
    session.config.stash[LEDGER].collect(collected)
    collected.clear()


@pytest.hookimpl(wrapper=True, trylast=True)  # within pytest's own, which must start even if this raises
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Before a test that must not record, refuse the network to fixtures of wider scope too, which are set up first."""
    item.config.stash[CURRENT] = item
    item.stash[PASSED] = None
    item.stash[REFUSALS] = []
    arguments = mark_arguments(item)
    with ExitStack() as early:
        item.stash[EARLY] = early
        if arguments is not None and (settings := resolve_settings(item.config, arguments))["mode"] == "none":
            from aggregator.testing.taping import refuse_early

            path = cassette_path(item, arguments["name"])
            early.enter_context(refuse_early(path, settings["allowed_hosts"], item.stash[REFUSALS]))
        return (yield)


@pytest.fixture(autouse=True)
def _aggregator_cassette(request: pytest.FixtureRequest) -> Iterator[None]:
    """Open the cassette of a marked test around its fixtures and its call."""
    item = request.node
    arguments = mark_arguments(item)
    if arguments is None:
        yield
        return
    from aggregator.testing.taping import Taping

    ledger = request.config.stash[LEDGER]
    path, settings = cassette_path(item, arguments["name"]), resolve_settings(request.config, arguments)
    if (other := ledger.shared.get(item.nodeid)) is not None:
        raise pytest.UsageError(
            f"Expected another cassette for {item.nodeid}, got {path}, which {other} uses; "
            'name one: @pytest.mark.cassette("name")'
        )
    settings["mode"] = ledger.mode(item.nodeid, path, settings["mode"])
    ledger.played[item.nodeid] = unfinished(path)
    item.stash[EARLY].close()
    with Taping(path, **settings, refusals=item.stash[REFUSALS]) as taping:
        if taping.tape.records:
            ledger.recorders.setdefault(path, set()).add(item.nodeid)
        item.stash[TAPING] = taping
        yield
        taping.passed = item.stash[PASSED] is True
        del item.stash[TAPING]  # items live as long as the session
    if taping.passed:
        ledger.played[item.nodeid] = taping.account()


@pytest.fixture
def cassette_tape(request: pytest.FixtureRequest) -> Tape:
    """The open tape of a test with the mark `cassette`."""
    if TAPING not in request.node.stash:
        raise pytest.UsageError(f"Expected @pytest.mark.cassette on {request.node.nodeid}, which uses `cassette_tape`")
    taping: Taping = request.node.stash[TAPING]
    return taping.tape


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Check the tape within the test, so that a swallowed miss or unplayed exchanges fail it."""
    try:
        outcome = yield
        if (taping := item.stash.get(TAPING, None)) is not None:
            taping.settle()
    except BaseException:  # Ctrl-C gets no report
        item.stash[PASSED] = False
        raise
    return outcome


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record a test's outcome (unittest, subtests and xfail decide it here); report errors that its code hid."""
    report = yield
    if call.when != "teardown" and item.stash.get(PASSED, None) is not False:
        called = report.passed and call.when == "call"
        item.stash[PASSED] = False if report.failed else (called or None)
    taping = item.stash.get(TAPING, None)
    if report.failed and taping is not None and (hidden := taping.unreported(report.longreprtext)):
        report.sections.append(("what the cassette refused", hidden))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Save the accounts for `aggregator cassette check --orphans`; an xdist worker sends them to the main process."""
    config = session.config
    ledger, cache = config.stash[LEDGER], getattr(config, "cache", None)  # None with `-p no:cacheprovider`
    if hasattr(config, "workeroutput"):
        config.workeroutput[PLAYED] = ledger.to_plain()
        return
    kept: Accounts = {} if cache is None else cache.get(PLAYED, {})
    partial = bool(getattr(config.option, "lf", False)) or any("::" in argument for argument in config.args)
    accounts = config.stash[ACCOUNTS] = ledger.merge_with(kept, config.rootpath, partial=partial)
    if cache is not None and accounts != kept and not config.option.collectonly:
        cache.set(PLAYED, accounts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the accounts of an xdist worker."""
    if (handed := getattr(node, "workeroutput", {}).get(PLAYED)) is not None:
        node.config.stash[LEDGER].add(handed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """List the exchanges that tests left unplayed."""
    lines = list(summary(config.stash[ACCOUNTS], config.stash[LEDGER].played))
    if lines:
        terminalreporter.section("cassettes")
    for line in lines:
        terminalreporter.line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_recording_configure(config: pytest.Config, vcr: Any) -> None:
    """Use an indexed tape for pytest-recording's `vcr` tests, if `cassette_serve_vcr` is set."""
    if not config.getini("cassette_serve_vcr"):
        return
    from aggregator.testing.serving_vcr import serve_vcr
    from aggregator.testing.taping import account_of

    item, played = config.stash[CURRENT], config.stash[LEDGER].played

    def note(path: Path, tape: Tape) -> None:
        played[item.nodeid] = account_of(path, tape) if item.stash[PASSED] else unfinished(path)

    serve_vcr(vcr, note)
