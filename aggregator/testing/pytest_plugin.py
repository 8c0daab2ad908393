"""The pytest plugin: `@pytest.mark.cassette` records the LLM calls of a test once, and replays them in later runs.

    @pytest.mark.cassette                                   # cassettes/<module>/<test>.yaml next to the module
    @pytest.mark.cassette("name", clients="all")            # cassettes/<module>/name.yaml; other clients served too
    @pytest.mark.cassette("shared/name", unplayed="error")  # cassettes/shared/name.yaml; the test fails on leftovers

Inactive unless a test has the mark: until then nothing but pytest is imported. Its options and fixtures have names of
their own, so that it can be used together with pytest-recording.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aggregator.testing.marks import (
    MODES,
    UNPLAYED,
    Accounts,
    Ledger,
    cassette_path,
    mark_arguments,
    resolve_settings,
    summary,
    unfinished,
)

if TYPE_CHECKING:
    from aggregator.cassettes.tape import Tape
    from aggregator.errors import CassetteError
    from aggregator.testing.taping import Taping

PLAYED = "aggregator/cassettes"  # where the cache keeps the accounts; `aggregator cassette check` reads it

LEDGER: pytest.StashKey[Ledger] = pytest.StashKey()
ACCOUNTS: pytest.StashKey[Accounts] = pytest.StashKey()
COLLECTED: pytest.StashKey[list[pytest.Item]] = pytest.StashKey()
CURRENT: pytest.StashKey[pytest.Item] = pytest.StashKey()

PASSED: pytest.StashKey[bool | None] = pytest.StashKey()
"""True after a call that passed, False after any failure; None before, and for a skipped test."""
EARLY: pytest.StashKey[ExitStack] = pytest.StashKey()
REFUSALS: pytest.StashKey[list[CassetteError]] = pytest.StashKey()
TAPING: pytest.StashKey[Taping] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our option and settings."""
    group = parser.getgroup("cassettes", "LLM exchanges recorded and replayed")
    group.addoption("--cassette-mode", choices=MODES, help="record mode of every marked test, whatever its mark says")
    parser.addini("cassette_dir", "folder of all cassettes, from the root (default: `cassettes` next to each module)")
    parser.addini("cassette_mode", f"record mode of marked tests: {', '.join(MODES)} (default: none in CI, else once)")
    parser.addini("cassette_clients", "other clients to serve: `all`, or names as `httpx requests`", type="args")
    parser.addini("cassette_unplayed", f"exchanges that a test left unplayed: {', '.join(UNPLAYED)}", default="report")
    parser.addini(
        "cassette_ignore_hosts", "hosts that cassettes leave to the network, in addition to the usual ones", type="args"
    )
    parser.addini("cassette_ignore_localhost", "leave this machine to the network", type="bool")
    parser.addini("cassette_allowed_hosts", "hosts that a replaying test may reach", type="args")
    parser.addini("cassette_shared", "leave permissions of new cassettes to the umask, not to their owner", type="bool")
    parser.addini("cassette_serve_vcr", "serve pytest-recording's `vcr` tests by an indexed tape", type="bool")


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
    """Add the collected tests to the ledger, now that they have all their marks."""
    collected = session.config.stash[COLLECTED]
    session.config.stash[LEDGER].collect(collected)
    collected.clear()


@pytest.hookimpl(wrapper=True, trylast=True)  # within pytest's own, which must start even if this raises
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Before a test that must not record, refuse the network to fixtures of wider scope too: they are set up first."""
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
    """Open the cassette of a marked test around its fixtures and itself."""
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
    """Check the tape within the test, so that a swallowed miss or unplayed exchanges make it fail."""
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
    """Record how a test ends (unittest, subtests and xfail decide it here); report what a failed test's code hid."""
    report = yield
    if call.when != "teardown" and item.stash.get(PASSED, None) is not False:
        called = report.passed and call.when == "call"
        item.stash[PASSED] = False if report.failed else (called or None)
    taping = item.stash.get(TAPING, None)
    if report.failed and taping is not None and (hidden := taping.unreported(report.longreprtext)):
        report.sections.append(("what the cassette refused", hidden))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Save what was played for `aggregator cassette check --orphans`; an xdist worker sends it to the main process."""
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
    """Add what an xdist worker played."""
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
    """Serve pytest-recording's `vcr` tests from an indexed tape, if `cassette_serve_vcr` is set."""
    if not config.getini("cassette_serve_vcr"):
        return
    from aggregator.testing.serving_vcr import serve_vcr
    from aggregator.testing.taping import account_of

    item, played = config.stash[CURRENT], config.stash[LEDGER].played

    def note(path: Path, tape: Tape) -> None:
        played[item.nodeid] = account_of(path, tape) if item.stash[PASSED] else unfinished(path)

    serve_vcr(vcr, note)
