"""What every test of training may ask for."""

from __future__ import annotations

import pytest
from training_fakes import Adder


@pytest.fixture
def adder() -> Adder:
    return Adder()
