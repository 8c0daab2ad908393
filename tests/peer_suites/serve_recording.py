"""A pytest plugin for the suite of pytest-recording, whose tests run projects: each has `cassette_serve_vcr`.

PYTEST_PLUGINS=aggregator.testing.pytest_plugin,serve_recording python -m pytest tests
"""

from __future__ import annotations

from typing import Any


def pytest_configure(config: Any) -> None:
    """Set the option as the ini file would."""
    config._inicache["cassette_serve_vcr"] = True
