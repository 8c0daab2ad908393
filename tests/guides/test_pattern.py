"""Regular expressions and keywords."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aggregator import ConfigError
from aggregator.errors import GuideError
from aggregator.guides import KeywordHints, RegexMatch

HINTS = {"OutOfMemory": "Use a smaller batch.", "Deadlock": "Take the locks in one order."}


@pytest.mark.parametrize(
    ("guide", "output", "info", "score"),
    [
        (RegexMatch(r"\bbilling\b"), "It is billing.", None, 1.0),
        (RegexMatch(r"billing", whole=True), "It is billing.", None, 0.0),
        (RegexMatch(whole=True), "billing", "bil+ing", 1.0),
        (RegexMatch(), "other", "bil+ing", 0.0),
        (RegexMatch("7"), 17, None, 1.0),
    ],
)
def test_pattern(guide: RegexMatch, output: Any, info: Any, score: float) -> None:
    """The pattern is the guide's own or each sample's, and matches anywhere or the whole output."""
    assert guide("x", output, info)[0] == score


def test_an_invalid_pattern_is_not_a_bad_answer() -> None:
    """An invalid pattern is an invalid argument; in the data it is the guide's failure, not a score of 0."""
    with pytest.raises(ConfigError, match="Expected a regular expression"):
        RegexMatch("(")
    with pytest.raises(GuideError, match="Expected a regular expression, got None"):
        RegexMatch()("x", "y", None)


def test_hints_of_found_keywords() -> None:
    """Each keyword found gives its hint, in the table's order; the score is the share of those without one."""
    guide = KeywordHints(HINTS)
    assert guide("x", "error: Deadlock, OutOfMemory", None) == (0.0, "\n".join(HINTS.values()))
    assert guide("x", "error: Deadlock", None) == (0.5, "Take the locks in one order.")
    assert guide("x", "error: deadlock", None) == (1.0, "Correct.")
    assert KeywordHints(HINTS, ignore_case=True)("x", "error: deadlock", None)[0] == 0.5


def test_required_keywords() -> None:
    """With required=True each missing keyword gives its hint."""
    guide = KeywordHints({"because": "Give the reason."}, required=True)
    assert guide("x", "Yes.", None) == (0.0, "Give the reason.")
    assert guide("x", "Yes, because.", None) == (1.0, "Correct.")


@pytest.mark.requirement("Trace: KeywordSuggest: JSON of keyword to hint, custom analyzers")
def test_analyzers_add_hints() -> None:
    """A function may add hints; None and "" mean none."""

    def too_long(x: Any, output: Any, info: Any) -> str | None:
        return f"At most {info} characters." if len(output) > info else None

    guide = KeywordHints({"sorry": "Do not apologise."}, analyzers=[too_long])
    assert guide("x", "sorry, no", 5) == (0.0, "Do not apologise.\nAt most 5 characters.")
    assert guide("x", "no", 5) == (1.0, "Correct.")


@pytest.mark.requirement("Trace: KeywordSuggest: JSON of keyword to hint, custom analyzers")
def test_hints_from_a_file(tmp_path: Path) -> None:
    """A JSON file of keyword -> hint is read once, when the guide is created."""
    path = tmp_path / "hints.json"
    path.write_text(json.dumps(HINTS), encoding="utf-8")
    assert KeywordHints(path)("x", "Deadlock", None)[0] == 0.5
    assert KeywordHints(str(path)).hints == HINTS


@pytest.mark.parametrize("hints", [{}, {"": "x"}, {"a": 5}, "missing.json"])
def test_invalid_hints_are_refused(hints: Any) -> None:
    """No keyword, an empty one, a hint that is not text, or a missing file is a ConfigError."""
    with pytest.raises(ConfigError, match="Expected"):
        KeywordHints(hints)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1}'])
def test_an_invalid_hint_file_is_refused(tmp_path: Path, text: str) -> None:
    """The error for a file that is not a table of texts has its name or content."""
    path = tmp_path / "hints.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="keyword -> hint"):
        KeywordHints(path)
