"""Fixtures for the tests of cassettes."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every client reach the loopback address without a proxy."""
    monkeypatch.setenv("no_proxy", "*")
