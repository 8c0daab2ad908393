"""Fixtures for the tests of training."""

from __future__ import annotations

import pytest
from training_fakes import Adder


@pytest.fixture
def adder() -> Adder:
    return Adder()
