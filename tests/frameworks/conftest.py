"""Fixtures for tests of real SDKs: the surroundings, a server, and each call of an installed SDK."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from calls import CALLS, Call, version_of
from model_server import ModelServer


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every SDK reach the loopback address without a proxy and nothing else."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def server() -> Iterator[ModelServer]:
    """A model that numbers its answers and returns them in any order."""
    with ModelServer() as running:
        yield running


@pytest.fixture(params=CALLS, ids=lambda call: f"{call.package or 'urllib'}-{call.name}".replace(" ", "_"))
def call(request: pytest.FixtureRequest) -> Call:
    """One call of one installed SDK."""
    chosen: Call = request.param
    if version_of(chosen) is None:
        pytest.skip(f"{chosen.package} is not installed")
    return chosen
