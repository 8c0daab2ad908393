"""The pytest plugin: `@pytest.mark.cassette` records what a test asks a model, and replays it ever after.

    @pytest.mark.cassette                                   # cassettes/<module>/<test>.yaml beside the test's module
    @pytest.mark.cassette("name", clients="all")            # cassettes/<module>/name.yaml; other clients served too
    @pytest.mark.cassette("shared/name", unplayed="error")  # cassettes/shared/name.yaml; the test fails on leftovers

Inactive unless a test bears the mark: nothing beyond pytest is imported before. Keeps to names of its own, so that it
lives beside pytest-recording.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from aggregator.cassettes.tape import Tape
    from aggregator.testing.taping import Taping

MODES = ("none", "once", "new_episodes", "all")
ARGUMENTS = ("mode", "clients", "lineage", "latency", "unplayed", "allowed_hosts")
UNPLAYED = ("ignore", "report", "error")
PLAYED = "aggregator/cassettes"  # where the cache keeps what the last run played; `aggregator cassette check` reads it
MAX_NAME = 120

TAPING: pytest.StashKey[Taping] = pytest.StashKey()
RUN: pytest.StashKey[dict[str, dict[str, Any]]] = pytest.StashKey()
OWNERS: pytest.StashKey[dict[Path, str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our option and settings."""
    group = parser.getgroup("cassettes", "LLM exchanges recorded and replayed")
    group.addoption("--cassette-mode", choices=MODES, help="record mode of every marked test, whatever its mark says")
    parser.addini("cassette_dir", "folder of all cassettes, from the root (default: `cassettes` beside each module)")
    parser.addini("cassette_mode", f"record mode of marked tests: {', '.join(MODES)} (default: none in CI, else once)")
    parser.addini("cassette_clients", "other clients to serve: `all`, or names as `httpx requests`", type="args")
    parser.addini("cassette_unplayed", f"exchanges that a test left unplayed: {', '.join(UNPLAYED)}", default="report")
    parser.addini("cassette_allowed_hosts", "hosts that a replaying test may reach", type="args")
    parser.addini("cassette_serve_vcr", "serve pytest-recording's `vcr` tests by an indexed tape", type="bool")


def pytest_configure(config: pytest.Config) -> None:
    """Describe the mark and start the account of what was played."""
    config.addinivalue_line(
        "markers",
        "cassette(name=None, *, mode=None, clients=(), lineage='strict', latency='off', unplayed=None, "
        "allowed_hosts=()): record this test's LLM exchanges, and replay them",
    )
    config.stash[RUN] = {}
    config.stash[OWNERS] = {}


@pytest.fixture(autouse=True)
def _aggregator_cassette(request: pytest.FixtureRequest) -> Iterator[None]:
    """Open the cassette of a marked test around its fixtures and itself."""
    arguments = mark_arguments(request.node)
    if arguments is None:
        yield
        return
    from aggregator.testing.taping import Taping

    path = cassette_path(request.node, arguments["name"])
    _claim(request.node, path, named=arguments["name"] is not None)
    with Taping(path, **settled(request.config, arguments)) as taping:
        request.node.stash[TAPING] = taping
        yield
    request.config.stash[RUN][request.node.nodeid] = taping.account()


@pytest.fixture
def cassette_tape(request: pytest.FixtureRequest) -> Tape:
    """The open tape of a test that bears the mark `cassette`."""
    if TAPING not in request.node.stash:
        raise pytest.UsageError(f"expected @pytest.mark.cassette on {request.node.nodeid}, which uses `cassette_tape`")
    taping: Taping = request.node.stash[TAPING]
    return taping.tape


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Settle within the test, so that a miss that was swallowed, or exchanges left over, make it fail."""
    taping = item.stash.get(TAPING, None)
    if taping is None:
        return (yield)
    try:
        outcome = yield
        taping.settle()
    except BaseException:
        taping.failed = True
        raise
    return outcome


def mark_arguments(item: pytest.Item) -> dict[str, Any] | None:
    """Return what the marks of a test say, the closest last to win; None where it bears none."""
    found: dict[str, Any] = {"name": None}
    marks = list(item.iter_markers("cassette"))
    for mark in reversed(marks):
        unknown = set(mark.kwargs) - {*ARGUMENTS, "name"}
        if unknown or len(mark.args) > 1:
            raise pytest.UsageError(
                f"expected @pytest.mark.cassette(name, {', '.join(ARGUMENTS)}), got {mark.args} {mark.kwargs} "
                f"- at {item.nodeid}"
            )
        found.update(mark.kwargs, **({"name": mark.args[0]} if mark.args else {}))
    return found if marks else None


def settled(config: pytest.Config, arguments: dict[str, Any]) -> dict[str, Any]:
    """Settle what command line, mark and ini file say, in this order; in CI only the command line makes it record."""
    in_ci = "none" if os.environ.get("CI") else None
    mode = config.getoption("--cassette-mode") or in_ci or arguments.get("mode") or config.getini("cassette_mode")
    unplayed = arguments.get("unplayed") or config.getini("cassette_unplayed")
    if unplayed not in UNPLAYED:
        raise pytest.UsageError(f"expected unplayed to be one of {', '.join(UNPLAYED)}, got {unplayed!r}")
    clients = arguments.get("clients", config.getini("cassette_clients"))
    return {
        "mode": mode or None,
        "clients": "all" if list(clients) == ["all"] else clients,
        "lineage": arguments.get("lineage", "strict"),
        "latency": arguments.get("latency", "off"),
        "unplayed": unplayed,
        "allowed_hosts": [*config.getini("cassette_allowed_hosts"), *arguments.get("allowed_hosts", ())],
    }


def cassette_path(item: pytest.Item, name: str | None) -> Path:
    """Return a test's file. A name with a slash is shared among modules, one without belongs to its module."""
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
    return base / inside / (name if name.endswith((".yaml", ".yml", ".json")) else f"{name}.yaml")


def _file_name(test: str) -> str:
    """A test's name as a file's, as pytest-recording makes it, so that a cassette can change hands.

    >>> _file_name("test_route[a/b]")
    'test_route[a-b]'
    """
    safe = re.sub(r"""[<>?%*:|"'/\\]""", "-", test)
    return safe if len(safe) <= MAX_NAME else f"{safe[:MAX_NAME]}-{hashlib.sha256(test.encode()).hexdigest()[:12]}"


def _claim(item: pytest.Item, path: Path, *, named: bool) -> None:
    """Two tests may share a cassette by naming it, never because their names happen to make the same file."""
    owner = item.config.stash[OWNERS].setdefault(path, item.nodeid)
    if owner != item.nodeid and not named:
        raise pytest.UsageError(
            f"expected a cassette of its own for {item.nodeid}, got {path}, which {owner} uses; "
            'name one: @pytest.mark.cassette("name")'
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what was played for `aggregator cassette check --orphans`; an xdist worker hands it to the main process."""
    run, config = session.config.stash[RUN], session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput[PLAYED] = run
    elif run and (cache := getattr(config, "cache", None)) is not None:  # gone with `-p no:cacheprovider`
        cache.set(PLAYED, run)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what an xdist worker played."""
    node.config.stash[RUN].update(getattr(node, "workeroutput", {}).get(PLAYED, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the exchanges that tests left unplayed."""
    run = config.stash[RUN]
    left = {test: played["unplayed"] for test, played in run.items() if played["report"] and played["unplayed"]}
    if left:
        terminalreporter.section("cassettes")
        for test, exchanges in sorted(left.items()):
            terminalreporter.line(
                f"{test} left {len(exchanges)} recorded exchanges unplayed: {', '.join(exchanges[:3])}"
            )


@pytest.hookimpl(optionalhook=True)
def pytest_recording_configure(config: pytest.Config, vcr: Any) -> None:
    """Serve pytest-recording's `vcr` tests from an indexed tape, where `cassette_serve_vcr` asks for it."""
    if config.getini("cassette_serve_vcr"):
        from aggregator.testing.serving_vcr import serve_vcr

        serve_vcr(vcr)
