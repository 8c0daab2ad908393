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
from contextlib import ExitStack
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

    path = cassette_path(request.node, arguments.pop("name"))
    _claim(request.node, path, named="name" in arguments)
    taping = Taping(path, **settled(request.config, arguments))
    request.node.stash[TAPING] = taping
    with ExitStack() as stack:
        stack.enter_context(taping)
        yield
    request.config.stash[RUN][request.node.nodeid] = taping.account()


@pytest.fixture
def cassette_tape(request: pytest.FixtureRequest) -> Tape:
    """The open tape of a test that bears the mark `cassette`."""
    if TAPING not in request.node.stash:
        raise pytest.UsageError(f"expected @pytest.mark.cassette on {request.node.nodeid}, which uses `cassette_tape`")
    return request.node.stash[TAPING].tape


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
