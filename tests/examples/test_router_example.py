"""The example of the README's agent runs offline, and prints a step before the scores that it made."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_router.py"


def test_the_router_example_trains_to_a_perfect_score(capsys: pytest.CaptureFixture[str]) -> None:
    """What a newcomer runs first needs no key, and shows the proposals, decisions and test scores of each step."""
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["test score before training: 0.125", "step 0: score of the minibatch 0.0"]
    scores = [line.rpartition("test score ")[2] for line in lines if "; test score " in line]
    assert (len(scores), scores[-1]) == (4, "1.0")
    assert "changed: instruction" in lines
