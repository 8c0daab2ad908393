"""What `@pytest.mark.cassette`, the command line and the ini file say about one test. Imports nothing but pytest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

MODES = ("none", "once", "new_episodes", "all")
OPTIONS = (
    *("clients", "lineage", "latency", "ignore", "match_on", "allow_playback_repeats", "ignore_hosts"),
    *("ignore_localhost", "before_record_request", "before_record_response", "redact", "keep", "keep_headers", "code"),
)
"""Arguments of the mark that are those of `cassette(...)`."""
ARGUMENTS = ("mode", *OPTIONS, "unplayed", "allowed_hosts")
UNPLAYED = ("ignore", "report", "error")
MAX_NAME = 120
MAX_BYTES = 200  # file systems take 255, and `.new`, `.lock` or a shard's number is appended


def mark_arguments(item: pytest.Item) -> dict[str, Any] | None:
    """Return the arguments of a test's marks, those of the closest mark first; None without a mark."""
    found: dict[str, Any] = {"name": None}
    marks = _closest_first(item)
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


def _closest_first(item: pytest.Item) -> list[pytest.Mark]:
    """Return the marks in pytest's order, but those of a `pytest.param` before its function's."""
    marks = list(item.iter_markers("cassette"))
    call = getattr(item, "callspec", None)
    given = [mark for mark in getattr(call, "marks", ()) if mark.name == "cassette"]
    return [*given, *(mark for mark in marks if not any(mark is one for one in given))]


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
    if hosts is not None:  # nothing is left out then, whatever the ini file says
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
