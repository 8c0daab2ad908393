"""A pytest plugin for vcrpy's own suite: its cassettes are ours, wherever their options allow it.

python -m pytest -p serve_vcrpy tests/integration       in a checkout of vcrpy, this folder on PYTHONPATH
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vcr import VCR
from vcr.persisters.filesystem import FilesystemPersister

from aggregator.cassettes.tape import Tape
from aggregator.testing.serving_vcr import can_serve, served_context

COUNTS = {"ours": 0, "stock": 0}
_stock = VCR._use_cassette


def _use_cassette(self: Any, with_current_defaults: bool = False, **options: Any) -> Any:
    if can_serve(
        self, {name: value for name, value in options.items() if name != "path"}, persisters=(FilesystemPersister,)
    ):
        COUNTS["ours"] += 1
        return served_context(self, _note, options)
    COUNTS["stock"] += 1
    return _stock(self, with_current_defaults, **options)


def _note(path: Path, tape: Tape) -> None:
    """Do not report a suite's cassettes."""


VCR._use_cassette = _use_cassette


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many cassettes were ours."""
    terminalreporter.line(f"cassettes of ours: {COUNTS['ours']}, of stock vcrpy: {COUNTS['stock']}")
